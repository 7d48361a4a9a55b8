"""Metrics of a step from the per-token values of the whole batch, in batch order.

Every rank holds the same arrays, so every rank computes the same numbers and a mean of micro-batch
means can not happen. A metric of no tokens is 0.

    kl_reverse          mean of l = log pi - log q                       KL(student || teacher)
    kl_forward          mean of u log u - u + 1, u = q / pi, never < 0   KL(teacher || student)
    ppl_drift           exp of the mean of log pi - log mu: perplexity of the rollout engine over the
                        learner's
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from opd_megatron.losses.batch_plan import BatchArrays, TokenPlan
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import log_ratios

# First response positions of the buckets that the log-ratio is reported for.
POSITION_BUCKETS = (0, 16, 64, 256, 1024, 4096)


def bucket_names() -> tuple[str, ...]:
    """Names of the position buckets, e.g. "0-15" and "4096+"."""
    ends = [f"-{after - 1}" for after in POSITION_BUCKETS[1:]] + ["+"]
    return tuple(f"{first}{end}" for first, end in zip(POSITION_BUCKETS, ends, strict=True))


def response_positions(response_ids_N: torch.Tensor) -> torch.Tensor:
    """Position of every token in its response, [N]; tokens of a response are adjacent."""
    index_N = torch.arange(len(response_ids_N))
    starts_N = torch.ones_like(response_ids_N, dtype=torch.bool)
    starts_N[1:] = response_ids_N[1:] != response_ids_N[:-1]
    first_N = torch.where(starts_N, index_N, torch.zeros_like(index_N)).cummax(0).values
    return index_N - first_N


def step_metrics(
    settings: LossSettings,
    arrays: BatchArrays,
    plan: TokenPlan,
    values: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """One float a metric.

    Args:
        values: [N] each: `student_logprobs`, `student_entropy`, `losses`, `advantages`, `weights`,
            `outside`, and the extras of the loss.

    Returns:
        Metrics by the names of docs/metrics.md; NaN where a value is.
    """
    if settings.is_supervised:
        return _supervised_metrics(plan, values)
    kept_N = plan.mask_N
    student_N = values["student_logprobs"].double()
    log_r = log_ratios(student_N, arrays.teacher_logprobs_N)
    drift_N = student_N - arrays.behavior_logprobs_N

    def mean(values_N: torch.Tensor) -> float:
        return _mean_of_kept(plan, values_N)

    def largest(values_N: torch.Tensor) -> float:
        return float(values_N[kept_N].abs().max()) if plan.num_kept else 0.0

    drift = mean(drift_N)
    metrics = plan.metrics | {
        "train/loss": mean(values["losses"]),
        "train/tokens": float(plan.num_kept),
        "train/kl_reverse": mean(log_r),
        "train/kl_forward": mean(torch.expm1(-log_r) * -log_r - torch.expm1(-log_r) - log_r),
        "train/entropy": mean(values["student_entropy"]),
        "train/advantage_mean": mean(values["advantages"]),
        "train/advantage_abs_max": largest(values["advantages"]),
        "offpolicy/logprob_diff_mean": mean(drift_N.abs()),
        "offpolicy/logprob_diff_max": largest(drift_N),
        # exp overflows beyond 709; a drift that large is reported as infinite, not as an error.
        "offpolicy/ppl_drift": math.exp(drift) if drift < 700 else math.inf,
    }
    kind = settings.correction.kind
    metrics["offpolicy/masked_frac"] = mean(values["outside"]) if kind == "masked" else 0.0
    if kind == "truncated":
        metrics["offpolicy/truncated_frac"] = mean(values["outside"])
    if arrays.teacher_entropy_N is not None:
        name = "teacher/entropy" if arrays.teacher_entropy_exact else "teacher/entropy_topk"
        metrics[name] = mean(arrays.teacher_entropy_N)
    for name in ("support_divergence", "support_student_mass", "support_teacher_mass"):
        if name in values:
            metrics[f"train/{name}"] = mean(values[name])
    for name in ("clipped", "support_overlap"):
        if name in values:
            metrics[f"train/{name}_frac"] = mean(values[name])
    return metrics | _by_position(log_r, arrays, kept_N)


def _mean_of_kept(plan: TokenPlan, values_N: torch.Tensor) -> float:
    return float(values_N[plan.mask_N].double().mean()) if plan.num_kept else 0.0


def _supervised_metrics(plan: TokenPlan, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Of given responses: nothing that compares with a teacher or a rollout engine."""
    return plan.metrics | {
        "train/loss": _mean_of_kept(plan, values["losses"]),
        "train/cross_entropy": -_mean_of_kept(plan, values["student_logprobs"]),
        "train/tokens": float(plan.num_kept),
        "train/entropy": _mean_of_kept(plan, values["student_entropy"]),
    }


def _by_position(
    log_r: torch.Tensor, arrays: BatchArrays, kept_N: torch.Tensor
) -> dict[str, float]:
    """Mean log-ratio of the kept tokens in every bucket that has one."""
    borders = torch.tensor(POSITION_BUCKETS)
    bucket_N = torch.bucketize(response_positions(arrays.response_ids_N), borders, right=True) - 1
    found: dict[str, float] = {}
    for bucket, name in enumerate(bucket_names()):
        chosen_N = kept_N & (bucket_N == bucket)
        if bool(chosen_N.any()):
            found[f"train/log_ratio_at/{name}"] = float(log_r[chosen_N].mean())
    return found
