"""Sections that decide the loss."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.divergences import DIVERGENCES
from opd_megatron.config.schema.fields import choice, number

# The estimator that trains on given responses instead of the student's own.
SUPERVISED_ESTIMATOR = "cross_entropy"
SUPPORTS = (
    "teacher_topk",
    "student_topk",
    "union",
    "intersection",
    "symmetric_difference",
    "teacher_topk_plus_sampled",
    "full",
)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised. `reverse_kl` = KL(student || teacher), in words: student against teacher.

    `estimator` says how: from the sampled token (`policy_gradient` and the value forms), or from a set of
    tokens at every position (`support_matching`, `topk_surrogate`). `cross_entropy` is supervised training, on the
    responses of the data: no rollouts, no teacher. `opd objectives` lists what exists, what is proven and what needs
    `allow_biased`.
    """

    divergence: str = choice("reverse_kl", *DIVERGENCES)
    estimator: str = choice(
        "policy_gradient",
        "policy_gradient",
        "value_as_advantage",
        "k2_as_advantage",
        "k3_as_advantage",
        "k2_differentiated",
        "k3_differentiated",
        "support_matching",
        "topk_surrogate",
        SUPERVISED_ESTIMATOR,
    )
    # Of the two support estimators: which tokens, how many of each side, what happens to the mass outside.
    support: str = choice("teacher_topk", *SUPPORTS)
    topk: int = number(64, 1)
    measure: str = choice("tail_bucket", "tail_bucket", "renormalized", "raw", "generalized")
    # Served teachers, tokens that their top-K may not have (teacher/routes.py): how they are asked, and what `auto`
    # may spend on it, of one teacher's answers.
    support_route: str = choice("auto", "auto", "whole", "listed", "larger_topk")
    route_bytes_per_token: int = number(16384, 64)
    # Find the student's own top-K too, to report how much of the teacher's it shares.
    report_overlap: bool = False
    # Of `topk_surrogate`.
    token_weights: str = choice("student_p", "student_p", "teacher_p", "none")
    # Of the teacher in the mixture of `jsd`; between 0 and 1, both excluded.
    jsd_teacher_weight: float = number(0.5, 0.0, 1.0)
    # Order of `alpha` and `tsallis`; above 0 and not 1.
    alpha: float = number(0.5, 0.0, 2.0)
    # Multiplies the distillation term: the KL coefficient of RL + OPD.
    coefficient: float = number(1.0, 0.0)
    entropy_bonus: float = number(0.0, 0.0)
    # 0: every position descends its own divergence. 1: the divergence of whole responses.
    discount: float = number(0.0, 0.0, 1.0)
    normalization: str = choice("token_mean", "token_mean", "sequence_mean")
    # Special tokens of the tokenizer that do not train: none, all, or all but those that end a response.
    mask_special_tokens: str = choice("none", "none", "all", "all_but_end")
    # PPO bounds around 1; they act from the second update on a batch (batch.updates_per_step > 1).
    clip_low: float = number(0.2, 0.0, 1.0)
    clip_high: float = number(0.2, 0.0)
    allow_biased: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task reward beside the distillation term: `coefficient` times the advantage of a graded response.

    0 is pure distillation. `grader` is one of the evaluation's graders; the prompts need an `answer`.
    """

    coefficient: float = number(0.0, 0.0)
    grader: str = "exact_match"


@dataclass(frozen=True, kw_only=True)
class WhiteningConfig:
    """Zero mean and unit variance within a scope, and of which term.

    `of`: `task` whitens the task advantage alone (group: as GRPO does); `distillation` the distillation term alone;
    `sum` both together. The last two take away the mean of the distillation term, which is the divergence that is
    to go down, and need `objective.allow_biased`.
    """

    scope: str = choice("none", "none", "sample", "group", "batch")
    of: str = choice("task", "task", "distillation", "sum")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Train only on tokens whose score lies in [low, high) percent of the step's tokens; 100 has no upper bound.

    Scores: `kl` (log pi - log q of the sampled token), `student_entropy`, `teacher_entropy` (of the teacher's
    top-K with the rest as one entry: a lower bound).
    """

    score: str = choice("none", "none", "kl", "student_entropy", "teacher_entropy")
    low: float = number(0.0, 0.0, 100.0)
    high: float = number(100.0, 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weight between the rollout engine and the learner, for the same weights.

    `masked` (IcePop): tokens whose ratio leaves [low, high] get weight 0; `truncated`: the ratio is clipped;
    `none`: weight 1. `level`: the ratio of the token, of its whole response, or their geometric mean.
    """

    kind: str = choice("masked", "none", "masked", "truncated")
    level: str = choice("token", "token", "sequence", "geometric_mean")
    low: float = number(0.5, 0.0)
    high: float = number(2.0, 0.0)
