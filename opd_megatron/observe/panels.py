"""The curves of the report as data: what shares a picture, its unit, what good looks like.

Colours carry meaning across the whole page: blue is the training batch, orange the held-out
problems, green the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from opd_megatron.observe.metric_table import PER_TEACHER, POSITION_BUCKETS

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2b6cb0", "#d9730d", "#2f855a", "#805ad5", "#8a94a3"
_TEACHER_COLORS = (GREEN, BLUE, ORANGE, PURPLE, GREY)


@dataclass(frozen=True, slots=True)
class Curve:
    """One series. `dots` marks single measurements, for what is not measured at every step."""

    metric: str
    label: str
    color: str = BLUE
    dots: bool = False

    def of_each(self, names: Sequence[str]) -> tuple[Curve, ...]:
        """Itself, or one curve a teacher, labelled with its name."""
        if not self.metric.endswith(PER_TEACHER):
            return (self,)
        return tuple(
            replace(self, metric=name, label=name.rpartition("/")[2], color=color)
            for name, color in zip(names, cycle(_TEACHER_COLORS))
        )


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    `span` is the smallest range of the value axis, so that noise is not blown up to the height of
    the picture; `low`/`high` are hard limits. `reference` is a metric drawn as a horizontal line
    at its last value.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    caption: str
    reference: Curve | None = None
    low: float | None = None
    high: float | None = None
    span: float = 0.0
    logarithmic: bool = False

    @property
    def percent(self) -> bool:
        return self.unit == "%"


@dataclass(frozen=True, slots=True)
class Section:
    """Panels under one question. `optional`: a panel of which nothing was recorded is left out, not shown empty."""

    question: str
    panels: tuple[Panel, ...]
    optional: bool = False


_LEARNED = Section(
    "Did the student learn?",
    (
        Panel(
            "Held-out accuracy",
            "%",
            (
                Curve("eval/heldout/accuracy", "mean of n", ORANGE, dots=True),
                Curve("eval/heldout/best_of_n", "best of n", GREY, dots=True),
            ),
            "Good: the mean climbs towards the teacher's line and towards best of n, which says "
            "what the student could do already.",
            reference=Curve("eval/heldout/teacher_accuracy", "teacher", GREEN),
            low=0.0,
            high=1.0,
        ),
        Panel(
            "Reverse KL, student against teacher",
            "nats/token",
            (
                Curve("train/kl_reverse", "train, sampled"),
                Curve("eval/heldout/kl_reverse", "held-out", ORANGE, dots=True),
            ),
            "KL(student || teacher): how unlikely the teacher finds what the student says. Good: "
            "falls fast, then flattens, and both curves agree.",
            low=0.0,
        ),
        Panel(
            "Forward KL, teacher against student",
            "nats/token",
            (
                Curve("train/kl_forward", "train, sampled"),
                Curve("eval/heldout/kl_forward", "held-out", ORANGE, dots=True),
            ),
            "KL(teacher || student), at the student's tokens too. Good: falls too. If it rises "
            "while the reverse KL falls, the student drops answers that the teacher knows.",
            low=0.0,
        ),
        Panel(
            "Entropy of the student",
            "nats",
            (Curve("train/entropy", "train batch"),),
            "Good: levels off near the teacher's entropy. A fall to 0 means that the student "
            "stopped exploring.",
            low=0.0,
        ),
    ),
)
_SUPERVISED = Section(
    "How well does it predict the given responses?",
    (
        Panel(
            "Cross-entropy",
            "nats/token",
            (Curve("train/cross_entropy", "train batch"),),
            "Good: falls and levels off at the entropy of the data. Over several epochs it goes on "
            "falling while the held-out accuracy does not: then it learns by heart.",
            low=0.0,
        ),
    ),
    optional=True,
)
_STABLE = Section(
    "Is training stable?",
    (
        Panel(
            "Gradient norm before clipping",
            "L2 norm",
            (Curve("train/grad_norm", "all ranks"),),
            "Good: same order of magnitude throughout. Growing spikes call for a lower rate.",
            low=0.0,
        ),
        Panel(
            "Response length",
            "tokens",
            (
                Curve("rollout/len_mean", "train batch"),
                Curve("eval/heldout/len_mean", "held-out", ORANGE, dots=True),
            ),
            "Good: settles at the length the task needs. Drift up to the limit goes with "
            "truncation.",
            span=4.0,
        ),
        Panel(
            "Truncated responses",
            "%",
            (
                Curve("rollout/truncated_frac", "train batch"),
                Curve("eval/heldout/truncated_frac", "held-out", ORANGE, dots=True),
            ),
            "Share cut at the token limit. Good: near 0; a truncated response never shows how "
            "it ends.",
            low=0.0,
            span=0.05,
        ),
        Panel(
            "Advantage",
            "nats",
            (
                Curve("train/advantage_mean", "mean"),
                Curve("train/advantage_abs_max", "largest |A|", GREY),
            ),
            "log q - log pi of the sampled tokens. Good: the mean rises to 0. A few tokens with "
            "a large |A| carry most of the signal.",
        ),
    ),
)
_ON_POLICY = Section(
    "Do rollout server and learner agree?",
    (
        Panel(
            "Tokens masked by the correction",
            "%",
            (Curve("offpolicy/masked_frac", "train batch"),),
            "Share whose importance ratio left the trusted interval. Good: 0 in fp32 and "
            "on-policy, below 1% in bf16.",
            low=0.0,
            span=0.01,
        ),
        Panel(
            "Perplexity drift",
            "ratio",
            (Curve("offpolicy/ppl_drift", "server / learner"),),
            "Good: 1. A slow walk away from 1 means that the two engines grow apart.",
            span=0.01,
        ),
        Panel(
            "Log-prob difference",
            "nats",
            (
                Curve("offpolicy/logprob_diff_max", "largest", GREY),
                Curve("offpolicy/logprob_diff_mean", "mean"),
            ),
            "|learner - server| for the same tokens. Good: flat and small (1e-6 to 1e-4 in "
            "fp32). A jump means different weights.",
            logarithmic=True,
        ),
        Panel(
            "Age of the samples",
            "weight versions",
            (
                Curve("offpolicy/age_max", "oldest", GREY),
                Curve("offpolicy/age_mean", "mean"),
                Curve("offpolicy/token_age_mean", "mean of tokens", ORANGE),
            ),
            "Good: 0 for a strictly on-policy run; never above max_staleness. Read it with the masked "
            "fraction and the KL: weights that differ too much mask what they would have to correct.",
            low=0.0,
            span=1.0,
        ),
    ),
)
# Light to dark along the response.
_POSITION_COLORS = ("#6aa5d8", "#4a8cc4", BLUE, "#22609a", "#1b4a78", "#132f50")
_TRAINED_ON = Section(
    "What is trained on?",
    (
        Panel(
            "Log-ratio along the response",
            "nats/token",
            tuple(
                Curve(f"train/log_ratio_at/{bucket}", bucket, color)
                for bucket, color in zip(POSITION_BUCKETS, _POSITION_COLORS, strict=True)
            ),
            "log pi - log q of the sampled tokens, by position. Good: all fall. Late positions that "
            "stay high have drifted to text that the teacher would not have begun.",
        ),
        Panel(
            "Probability on the support",
            "%",
            (
                Curve("train/support_student_mass", "student"),
                Curve("train/support_teacher_mass", "teacher", GREEN),
            ),
            "Good: near 100%. What a renormalized or raw measure does not cover is not trained.",
            low=0.0,
            high=1.0,
        ),
        Panel(
            "Teacher's top-K also among the student's",
            "%",
            (Curve("train/support_overlap_frac", "overlap"),),
            "Good: rises.",
            low=0.0,
            high=1.0,
        ),
        Panel(
            "Tokens that train",
            "%",
            (
                Curve("train/filter_kept_frac", "pass filter"),
                Curve("train/special_masked_frac", "special, masked", GREY),
            ),
            "Share of tokens the recipe's filter keeps, and of special tokens it masks.",
            low=0.0,
            high=1.0,
        ),
        Panel(
            "Reward of the rollouts",
            "",
            (Curve("task/reward_mean", "mean"),),
            "What the task's grader gives, before whitening. Good: rises.",
        ),
        Panel(
            "Tokens clipped",
            "%",
            (Curve("train/clipped_frac", "last update"),),
            "Share that an update on the same batch moved out of the clipping interval. Good: a few percent at most.",
            low=0.0,
            high=1.0,
        ),
    ),
    optional=True,
)
_TEACHERS = Section(
    "Who teaches, and how far is the student from each?",
    (
        Panel(
            "Share of the tokens that learn from each teacher",
            "%",
            (Curve(f"teacher/share/{PER_TEACHER}", ""),),
            "A schedule hands over from one to the next; in a mean each has its weight.",
            low=0.0,
            high=1.0,
        ),
        Panel(
            "Held-out reverse KL to each teacher",
            "nats/token",
            (Curve(f"eval/heldout/kl_reverse_to/{PER_TEACHER}", "", dots=True),),
            "KL(student || teacher). Good: falls for the one that teaches; for one that has taught it may rise.",
            low=0.0,
        ),
        Panel(
            "Held-out accuracy under each control text",
            "%",
            (Curve(f"eval/heldout/accuracy_as/{PER_TEACHER}", "", dots=True),),
            "The student, told by whom it was taught.",
            low=0.0,
            high=1.0,
        ),
    ),
    optional=True,
)
SECTIONS = (_LEARNED, _SUPERVISED, _TEACHERS, _STABLE, _ON_POLICY, _TRAINED_ON)
