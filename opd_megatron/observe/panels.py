"""The curves of the report as data: what shares a picture, its unit, what good looks like.

Colours carry meaning across the whole page: blue is the training batch, orange the held-out
problems, green the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2b6cb0", "#d9730d", "#2f855a", "#805ad5", "#8a94a3"


@dataclass(frozen=True, slots=True)
class Curve:
    """One series. `dots` marks single measurements, for what is not measured at every step."""

    metric: str
    label: str
    color: str = BLUE
    dots: bool = False


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
    """Panels under one question."""

    question: str
    panels: tuple[Panel, ...]


_LEARNED = Section(
    "Did the student learn?",
    (
        Panel(
            "Held-out accuracy",
            "%",
            (
                Curve("eval/heldout/accuracy", "mean@n", ORANGE, dots=True),
                Curve("eval/heldout/best_of_n", "best of n", GREY, dots=True),
            ),
            "Good: mean@n climbs towards the teacher's line and towards best of n, which says "
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
                Curve("eval/heldout/kl_reverse", "held-out, exact", ORANGE, dots=True),
            ),
            "KL(student || teacher), what training minimises. Good: falls fast, then flattens, "
            "and both curves agree.",
            low=0.0,
        ),
        Panel(
            "Forward KL, teacher against student",
            "nats/token",
            (
                Curve("train/kl_forward", "train, sampled"),
                Curve("eval/heldout/kl_forward", "held-out, exact", ORANGE, dots=True),
            ),
            "KL(teacher || student), not trained on. Good: falls too. If it rises while the "
            "reverse KL falls, the student drops answers that the teacher knows.",
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
            ),
            "Good: 0 for a strictly on-policy run; never above max_staleness.",
            low=0.0,
            span=1.0,
        ),
    ),
)
SECTIONS = (_LEARNED, _STABLE, _ON_POLICY)
