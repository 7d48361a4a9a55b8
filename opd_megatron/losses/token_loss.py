"""The loss of a micro-batch: token statistics and what was recorded in, a differentiable sum out.

Sampled tokens y, student pi, teacher q, behavior policy mu, at every kept position t:

    loss_t = s_t [ w_t (-Z_t A_t log pi(y_t) + c D_t) - b H(pi_t) ]     loss_sum = sum_t loss_t

A is the advantage: of the sampled-token estimators c times -(f'(pi/q) - f'(1)) (reverse KL: c (log q
- log pi), k1), plus the task's, if any. D_t is the divergence over a support, of the two support
estimators. w is the importance weight pi/mu with its bounds, Z the mass that truncated sampling kept
(truncation.py; 1 without), b the entropy bonus, c the coefficient of the distillation term, s the
normalization of the token. A, w, Z and s are constants. Because
-E_pi[A grad log pi] = grad D_f(pi || q), either form descends the divergence at every position.

For most objectives A and w follow from the micro-batch alone. What couples tokens (filters,
whitening, discounts, ratios of whole responses) is planned for the whole batch before
(batch_plan.py) and comes in as `planned`. With a second update on a batch the first term becomes
PPO's clipped one.

The function returns a sum. The caller divides by the GLOBAL number of kept tokens (all
micro-batches, all data- and context-parallel ranks), so the loss does not change with the cut.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from opd_megatron.losses.checks import (
    LOGPROB_DTYPES,
    LossInputError,
    check_dtype,
    check_no_nan,
    check_shape,
)
from opd_megatron.losses.clipping import clipped_losses
from opd_megatron.losses.combinations import check_settings
from opd_megatron.losses.corrections import MAX_LOG_RATIO, importance_weights
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.estimators import ESTIMATORS, Advantage
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.support_matching import support_divergence, support_masses, surrogate
from opd_megatron.losses.token_stats import TokenStats


@dataclass(frozen=True)
class SupportInputs:
    """The teacher at the ids whose student log-probs are `TokenStats.support_logprobs_TJ`.

    teacher_logprobs_TJ: [T, J] float32; any number where `valid_TJ` [T, J] bool is False.
    """

    teacher_logprobs_TJ: torch.Tensor
    valid_TJ: torch.Tensor


@dataclass(frozen=True)
class PlannedTokens:
    """A micro-batch's rows of a `TokenPlan`, [T] each; see batch_plan.py. None: follow from the micro-batch."""

    scale_T: torch.Tensor
    task_T: torch.Tensor | None = None
    advantages_T: torch.Tensor | None = None
    weights_T: torch.Tensor | None = None
    outside_T: torch.Tensor | None = None
    old_logprobs_T: torch.Tensor | None = None
    kept_mass_T: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenInputs:
    """What is recorded about the tokens of a micro-batch. Position t belongs to `target_ids_T[t]`.

    behavior_logprobs_T, teacher_logprobs_T: [T] float32, of the sampled token; any number where
        the mask is 0, and 0 for given responses, which the data is sure of. -inf from the teacher
        is an ordinary input: the log-ratio is bounded to +-60 nats.
    mask_T: [T] bool or 0/1 float, 1 for response tokens that train.
    support: needed by the support estimators, else None.
    divergence_T: [T] D over the whole vocabulary, differentiable (`fused.dense`), instead of `support`.
    planned: needed where `LossSettings.needs_scores` or a task term is set, else None.
    """

    behavior_logprobs_T: torch.Tensor
    teacher_logprobs_T: torch.Tensor
    mask_T: torch.Tensor
    support: SupportInputs | None = None
    planned: PlannedTokens | None = None
    divergence_T: torch.Tensor | None = None

    def rows(self, rows: slice) -> TokenInputs:
        """The same of some rows."""
        return cast(TokenInputs, _cut(self, rows))


def _cut(value: Any, rows: slice) -> Any:
    """Every tensor of a dataclass, and of the dataclasses in it, cut to some rows."""
    if value is None or isinstance(value, torch.Tensor):
        return None if value is None else value[rows]
    return type(value)(
        **{
            field.name: _cut(getattr(value, field.name), rows)
            for field in dataclasses.fields(value)
        }
    )


@dataclass(frozen=True)
class TokenLossOutput:
    """`loss_sum` carries the gradient; everything else is detached and 0 where the mask is.

    losses_T: its terms. advantages_T: credit of the sampled token (for support estimators and given
    responses log q - log pi, which only shows what the teacher thinks of it). weights_T: importance weights.
    outside_T: bool, the ratio left its bounds. extras: per-token values of the support estimators
    and of clipping, by name.
    """

    loss_sum: torch.Tensor
    losses_T: torch.Tensor
    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    outside_T: torch.Tensor
    extras: dict[str, torch.Tensor]


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
    for field in dataclasses.fields(inputs.planned) if inputs.planned is not None else ():
        planned_T = getattr(inputs.planned, field.name)
        if planned_T is not None:
            check_shape(f"planned.{field.name}", planned_T, (num_tokens,))


def log_ratios(student_T: torch.Tensor, teacher_T: torch.Tensor) -> torch.Tensor:
    """log pi - log q of sampled tokens, detached, bounded to +-60 nats."""
    return (student_T.detach() - teacher_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def make_advantage(settings: LossSettings) -> Advantage | None:
    """log(pi / q) -> coefficient times the advantage; None for support estimators."""
    if settings.has_support:
        return None
    objective = settings.objective
    made = ESTIMATORS.get(objective.estimator, "objective.estimator")(make_divergence(objective))
    return lambda log_r: objective.coefficient * made(log_r)


class _TokenLoss:
    """See the module docstring."""

    def __init__(self, settings: LossSettings, allow_nan: bool) -> None:
        check_settings(settings)
        self.settings = settings
        self.allow_nan = allow_nan
        self._advantage = make_advantage(settings)
        self._divergence = make_divergence(settings.objective)

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> TokenLossOutput:
        _check_inputs(stats, inputs, self.allow_nan)
        kept_T = inputs.mask_T.bool()
        student_T = stats.sampled_logprobs_T
        zero = student_T.new_zeros(())
        advantages_T, weights_T, outside_T = self._credit(student_T, inputs)
        advantages_T = torch.where(kept_T, advantages_T, zero)
        weights_T = torch.where(kept_T, weights_T, zero)
        loss_T, extras = self._policy_terms(
            torch.where(kept_T, student_T, zero), advantages_T, inputs, kept_T
        )
        if inputs.planned is not None and inputs.planned.kept_mass_T is not None:
            loss_T = inputs.planned.kept_mass_T * loss_T
        if self.settings.has_support:
            divergence_T, more = self._support_terms(stats, inputs, kept_T)
            loss_T = loss_T + self.settings.objective.coefficient * divergence_T
            extras |= more
        shown_T = advantages_T
        if self.settings.has_support or self.settings.is_supervised:
            shown_T = torch.where(kept_T, -log_ratios(student_T, inputs.teacher_logprobs_T), zero)
        # Not weight * loss where the mask is 0: the loss there may be anything.
        loss_T = torch.where(kept_T, weights_T * loss_T, zero)
        if self.settings.objective.entropy_bonus:
            bonus = self.settings.objective.entropy_bonus
            loss_T = loss_T - bonus * torch.where(kept_T, stats.entropy_T, zero)
        if inputs.planned is not None:
            loss_T = inputs.planned.scale_T * loss_T
        return TokenLossOutput(
            loss_sum=loss_T.sum(),
            losses_T=loss_T.detach(),
            advantages_T=shown_T,
            weights_T=weights_T,
            outside_T=outside_T & kept_T,
            extras=extras,
        )

    def _credit(
        self, student_T: torch.Tensor, inputs: TokenInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advantages, importance weights, and where the bounds of the weights acted."""
        planned = inputs.planned
        if planned is not None and planned.advantages_T is not None:
            advantages_T = planned.advantages_T
        elif self._advantage is not None:
            advantages_T = self._advantage(log_ratios(student_T, inputs.teacher_logprobs_T))
        else:
            advantages_T = torch.zeros_like(student_T, requires_grad=False)
        if planned is not None and planned.task_T is not None:
            advantages_T = advantages_T + planned.task_T
        if planned is not None and planned.weights_T is not None:
            assert planned.outside_T is not None, "weights are planned with their bounds"
            return advantages_T, planned.weights_T, planned.outside_T
        weights_T, outside_T = importance_weights(
            student_T, inputs.behavior_logprobs_T, self.settings.correction
        )
        return advantages_T, weights_T, outside_T

    def _policy_terms(
        self,
        student_T: torch.Tensor,
        advantages_T: torch.Tensor,
        inputs: TokenInputs,
        kept_T: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        planned = inputs.planned
        if planned is None or planned.old_logprobs_T is None:
            return -advantages_T * student_T, {}
        objective = self.settings.objective
        old_T = torch.where(kept_T, planned.old_logprobs_T, planned.old_logprobs_T.new_zeros(()))
        loss_T, clipped_T = clipped_losses(
            student_T, old_T, advantages_T, objective.clip_low, objective.clip_high
        )
        return loss_T, {"clipped": clipped_T.float()}

    def _support_terms(
        self, stats: TokenStats, inputs: TokenInputs, kept_T: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        objective = self.settings.objective
        if inputs.divergence_T is not None:
            assert objective.estimator == "support_matching", "combinations.py refuses the others"
            term_T = torch.where(kept_T, inputs.divergence_T, torch.zeros_like(inputs.divergence_T))
            everything_T = kept_T.to(term_T.dtype)
            return term_T, {
                "support_divergence": term_T.detach(),
                "support_student_mass": everything_T,
                "support_teacher_mass": everything_T,
            }
        if stats.support_logprobs_TJ is None or inputs.support is None:
            missing = "stats.support_logprobs_TJ" if inputs.support else "inputs.support"
            raise LossInputError(
                f"{missing}: None seen, the {'student' if inputs.support else 'teacher'} at the support "
                f"wanted, for objective.estimator={self.settings.objective.estimator}"
            )
        student_TJ, teacher_TJ = stats.support_logprobs_TJ, inputs.support.teacher_logprobs_TJ
        valid_TJ = inputs.support.valid_TJ & kept_T[:, None]
        if objective.estimator == "topk_surrogate":
            term_T = surrogate(
                student_TJ,
                teacher_TJ,
                valid_TJ,
                objective.measure,
                objective.token_weights,
                allow_nan=self.allow_nan,
            )
        else:
            term_T = support_divergence(
                self._divergence,
                student_TJ,
                teacher_TJ,
                valid_TJ,
                objective.measure,
                allow_nan=self.allow_nan,
            )
        student_mass_T, teacher_mass_T = support_masses(student_TJ, teacher_TJ, valid_TJ)
        extras = {
            "support_divergence": term_T.detach(),
            "support_student_mass": student_mass_T,
            "support_teacher_mass": teacher_mass_T,
        }
        return term_T, extras


def make_token_loss(settings: LossSettings | None = None, *, allow_nan: bool = False) -> TokenLoss:
    """The loss that a recipe asks for.

    Args:
        settings: what the loss is; None for the defaults.
        allow_nan: False raises on a NaN in a recorded log-prob; True lets it make `loss_sum` NaN,
            for a caller that decides about a bad step together with its peers.

    Returns:
        A function of (TokenStats, TokenInputs).

    Raises:
        ConfigError: a combination that does not exist, or is biased and not allowed to be.
    """
    return _TokenLoss(settings or LossSettings(), allow_nan)
