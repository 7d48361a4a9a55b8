"""The loss of a micro-batch: token statistics and recorded log-probs in, a differentiable sum out.

Sampled tokens y, student pi, teacher q, behavior policy mu:

    loss_sum = - sum_t mask_t [ w_t A_t log pi(y_t) + b H(pi_t) ]

A = -(f'(pi/q) - f'(1)) for the divergence D_f of the recipe (reverse KL: A = log q - log pi, k1), w
the importance weight pi/mu with its bounds; both are constants. b is the entropy bonus. Because
-E_pi[A grad log pi] = grad D_f(pi || q), the gradient of this loss descends the divergence at every
position, prefixes taken as they come: the discount is 0.

The function returns a sum and a count. The caller divides by the GLOBAL token count (all
micro-batches, all data- and context-parallel ranks), so the loss does not change with the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.losses.catalog import check_objective
from opd_megatron.losses.checks import LOGPROB_DTYPES, check_dtype, check_no_nan, check_shape
from opd_megatron.losses.corrections import MAX_LOG_RATIO, check_correction, importance_weights
from opd_megatron.losses.diagnostics import LOG_PPL_DRIFT
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.estimators import ESTIMATORS, Advantage
from opd_megatron.losses.token_stats import TokenStats


@dataclass(frozen=True)
class TokenInputs:
    """What is recorded about the tokens of a micro-batch. Position t belongs to `target_ids_T[t]`.

    behavior_logprobs_T, teacher_logprobs_T: [T] float32, of the sampled token; any number where
        the mask is 0. -inf from the teacher is an ordinary input: the log-ratio is bounded to
        +-60 nats.
    mask_T: [T] bool or 0/1 float, 1 for response tokens that train.
    """

    behavior_logprobs_T: torch.Tensor
    teacher_logprobs_T: torch.Tensor
    mask_T: torch.Tensor


@dataclass(frozen=True)
class TokenLossOutput:
    """`loss_sum` carries the gradient; everything else is detached.

    sums: metric -> (sum, weight), to be added over micro-batches and ranks.
    maxes: metric -> maximum.
    """

    loss_sum: torch.Tensor
    token_count: torch.Tensor
    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]]
    maxes: dict[str, torch.Tensor]


class TokenLoss(Protocol):
    """A loss over one micro-batch."""

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> TokenLossOutput: ...


def _check_inputs(stats: TokenStats, inputs: TokenInputs, allow_nan: bool) -> None:
    num_tokens = stats.sampled_logprobs_T.shape[0]
    for name, tensor in (
        ("behavior_logprobs_T", inputs.behavior_logprobs_T),
        ("teacher_logprobs_T", inputs.teacher_logprobs_T),
    ):
        check_dtype(name, tensor, LOGPROB_DTYPES)
        check_shape(name, tensor, (num_tokens,))
        if not allow_nan:
            check_no_nan(name, tensor)
    check_dtype("mask_T", inputs.mask_T, (torch.bool, *LOGPROB_DTYPES))
    check_shape("mask_T", inputs.mask_T, (num_tokens,))


def _diagnostics(
    stats: TokenStats,
    inputs: TokenInputs,
    advantages_T: torch.Tensor,
    outside_T: torch.Tensor,
    kind: str,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    kept_T = inputs.mask_T.bool()
    count = kept_T.sum().to(advantages_T.dtype)
    zero = torch.zeros((), dtype=advantages_T.dtype, device=advantages_T.device)

    def total(x_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(kept_T, x_T, zero).sum(), count

    student_T = stats.sampled_logprobs_T.detach()
    drift_T = student_T - inputs.behavior_logprobs_T
    outside = outside_T.to(advantages_T.dtype)
    sums = {
        "train/kl_reverse": total(
            (student_T - inputs.teacher_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ),
        "train/entropy": total(stats.entropy_T.detach()),
        "train/advantage_mean": total(advantages_T),
        "offpolicy/logprob_diff_mean": total(drift_T.abs()),
        "offpolicy/masked_frac": total(outside if kind == "masked" else torch.zeros_like(outside)),
        LOG_PPL_DRIFT: total(drift_T),
    }
    if kind == "truncated":
        sums["offpolicy/truncated_frac"] = total(outside)
    maxes = {
        "offpolicy/logprob_diff_max": _max(torch.where(kept_T, drift_T.abs(), zero)),
        "train/advantage_abs_max": _max(torch.where(kept_T, advantages_T.abs(), zero)),
    }
    return sums, maxes


def _max(x_T: torch.Tensor) -> torch.Tensor:
    return x_T.amax() if x_T.numel() else x_T.new_zeros(())


def sampled_token_loss(
    stats: TokenStats,
    inputs: TokenInputs,
    *,
    advantage: Advantage,
    correction: CorrectionConfig,
    entropy_bonus: float = 0.0,
    allow_nan: bool = False,
) -> TokenLossOutput:
    """Loss of one micro-batch from its sampled tokens; see the module docstring.

    Args:
        stats: of the student; its log-probs (and entropy, with a bonus) carry the gradient.
        inputs: recorded log-probs and the mask, on the same device.
        advantage: log(pi / q) -> A, elementwise.
        correction: how importance weights are bounded.
        entropy_bonus: added to the loss is -entropy_bonus times the entropy of each kept position.
        allow_nan: False raises on a NaN in a recorded log-prob; True lets it make `loss_sum` NaN,
            for a caller that decides about a bad step together with its peers.

    Returns:
        TokenLossOutput; `advantages_T` and `weights_T` are 0 where the mask is.

    Raises:
        LossInputError: wrong dtype or shape, or NaN in a recorded log-prob.
    """
    _check_inputs(stats, inputs, allow_nan)
    kept_T = inputs.mask_T.bool()
    student_T = stats.sampled_logprobs_T
    zero = torch.zeros((), dtype=student_T.dtype, device=student_T.device)
    log_ratio_T = (student_T.detach() - inputs.teacher_logprobs_T).clamp(
        -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    advantages_T = torch.where(kept_T, advantage(log_ratio_T), zero)
    weights_T, outside_T = importance_weights(student_T, inputs.behavior_logprobs_T, correction)
    weights_T = torch.where(kept_T, weights_T, zero)
    loss_T = -weights_T * advantages_T * torch.where(kept_T, student_T, zero)
    if entropy_bonus:
        loss_T = loss_T - entropy_bonus * torch.where(kept_T, stats.entropy_T, zero)
    sums, maxes = _diagnostics(stats, inputs, advantages_T, outside_T, correction.kind)
    return TokenLossOutput(
        loss_sum=loss_T.sum(),
        token_count=kept_T.sum(),
        advantages_T=advantages_T,
        weights_T=weights_T,
        sums=sums,
        maxes=maxes,
    )


def make_token_loss(
    objective: ObjectiveConfig, correction: CorrectionConfig, *, allow_nan: bool = False
) -> TokenLoss:
    """The loss that a recipe asks for.

    Args:
        objective: divergence, estimator and their parameters.
        correction: importance weights between behavior policy and learner.
        allow_nan: see `sampled_token_loss`.

    Returns:
        A function of (TokenStats, TokenInputs).

    Raises:
        ConfigError: a combination that does not exist, or is biased and not allowed to be.
    """
    check_objective(objective)
    check_correction(correction)
    estimator = ESTIMATORS.get(objective.estimator, "objective.estimator")
    advantage = estimator(make_divergence(objective))

    def token_loss(stats: TokenStats, inputs: TokenInputs) -> TokenLossOutput:
        return sampled_token_loss(
            stats,
            inputs,
            advantage=advantage,
            correction=correction,
            entropy_bonus=objective.entropy_bonus,
            allow_nan=allow_nan,
        )

    return token_loss
