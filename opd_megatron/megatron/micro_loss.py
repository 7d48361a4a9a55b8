"""One micro-batch on the last pipeline stage: the model's output in, loss sum and per-token values out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd_megatron.losses.batch_plan import TokenPlan
from opd_megatron.losses.served_supports import served_support
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.supports import Support, is_member
from opd_megatron.losses.token_loss import PlannedTokens, SupportInputs, TokenInputs, TokenLoss
from opd_megatron.losses.token_stats import TokenStats
from opd_megatron.megatron.forward import DeviceMicroBatch, MicroResult
from opd_megatron.megatron.output_head import OutputHead

SCORE_NAMES = ("student_logprobs", "student_entropy")
_SUPPORT_NAMES = ("support_divergence", "support_student_mass", "support_teacher_mass")


def value_names(settings: LossSettings, *, clipped: bool) -> tuple[str, ...]:
    """Names of the per-token values of a training micro-batch, the same on every rank and stage."""
    names = (*SCORE_NAMES, "losses", "advantages", "weights", "outside")
    if clipped:
        names += ("clipped",)
    if settings.has_support:
        names += _SUPPORT_NAMES
    if settings.student_topk:
        names += ("support_overlap",)
    return names


def _student_values(stats: TokenStats) -> dict[str, torch.Tensor]:
    return {"student_logprobs": stats.sampled_logprobs_T, "student_entropy": stats.entropy_T}


@dataclass(frozen=True)
class MicroScore:
    """Log-probs and entropies, without a loss."""

    head: OutputHead
    temperature: float

    def __call__(self, output: torch.Tensor, batch: DeviceMicroBatch) -> MicroResult:
        stats = self.head.stats(output, batch.target_ids_T, None, self.temperature)
        zero = stats.log_z_T.new_zeros(())
        return MicroResult(zero, (batch.output_index_T >= 0).sum(), _student_values(stats))


@dataclass(frozen=True)
class MicroLoss:
    """The recipe's loss under the plan of the batch; the plan's arrays are on the device."""

    head: OutputHead
    temperature: float
    settings: LossSettings
    token_loss: TokenLoss
    plan: TokenPlan

    def __call__(self, output: torch.Tensor, batch: DeviceMicroBatch) -> MicroResult:
        support, overlap_T = self._support(output, batch)
        inputs = TokenInputs(
            batch.behavior_logprobs_T,
            batch.teacher_logprobs_T,
            self._rows(self.plan.mask_N, batch),
            support=None if support is None else support[1],
            planned=self._planned(batch),
        )

        def loss(stats: TokenStats, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            made = self.token_loss(stats, inputs.rows(rows))
            values = _student_values(stats) | {
                "losses": made.losses_T,
                "advantages": made.advantages_T,
                "weights": made.weights_T,
                "outside": made.outside_T,
                **made.extras,
            }
            return made.loss_sum, {name: value.detach() for name, value in values.items()}

        loss_sum, parts = self.head.loss(
            output,
            batch.target_ids_T,
            None if support is None else support[0].ids_TJ,
            self.temperature,
            loss,
        )
        values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if overlap_T is not None:
            values["support_overlap"] = overlap_T
        return MicroResult(loss_sum, inputs.mask_T.sum(), values)

    def _rows(self, array_N: torch.Tensor, batch: DeviceMicroBatch) -> torch.Tensor:
        """The micro-batch's rows of an array in batch order, 0 where there is no response token."""
        index_T = batch.output_index_T
        return torch.where(index_T >= 0, array_N[index_T.clamp_min(0)], array_N.new_zeros(()))

    def _planned(self, batch: DeviceMicroBatch) -> PlannedTokens:
        plan = self.plan

        def rows(array_N: torch.Tensor | None) -> torch.Tensor | None:
            return None if array_N is None else self._rows(array_N, batch)

        return PlannedTokens(
            scale_T=self._rows(plan.scale_N, batch),
            task_T=rows(plan.task_N),
            advantages_T=rows(plan.advantages_N),
            weights_T=rows(plan.weights_N),
            outside_T=rows(plan.outside_N),
            old_logprobs_T=rows(plan.old_logprobs_N),
        )

    def _support(
        self, output: torch.Tensor, batch: DeviceMicroBatch
    ) -> tuple[tuple[Support, SupportInputs] | None, torch.Tensor | None]:
        """Support and the teacher on it; the share of the teacher's top-K that is the student's too."""
        if not self.settings.has_support:
            return None, None
        assert batch.topk_ids_TK is not None and batch.topk_logprobs_TK is not None
        student_ids_TK = overlap_T = None
        if self.settings.student_topk:
            student_ids_TK = self.head.student_topk(output, self.settings.student_topk)
            overlap_T = is_member(batch.topk_ids_TK, student_ids_TK).float().mean(1)
        support = served_support(
            self.settings.objective.support,
            vocab_size=self.head.vocab_size,
            topk_ids_TK=batch.topk_ids_TK,
            topk_logprobs_TK=batch.topk_logprobs_TK,
            sampled_ids_T=batch.target_ids_T,
            sampled_logprobs_T=batch.teacher_logprobs_T,
            student_ids_TK=student_ids_TK,
        )
        return support, overlap_T
