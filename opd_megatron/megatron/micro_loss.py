"""One micro-batch on the last pipeline stage: the model's output in, loss sum and per-token values out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from opd_megatron.losses.batch_plan import TokenPlan
from opd_megatron.losses.divergences import Divergence, make_divergence
from opd_megatron.losses.fused.dense import DenseStats
from opd_megatron.losses.served_supports import served_support
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.supports import Support, is_member
from opd_megatron.losses.teacher_logits import support_of_logits
from opd_megatron.losses.token_loss import PlannedTokens, SupportInputs, TokenInputs, TokenLoss
from opd_megatron.losses.token_stats import TokenStats
from opd_megatron.megatron.forward import DeviceMicroBatch, MicroResult
from opd_megatron.megatron.output_head import OutputHead
from opd_megatron.megatron.teacher_pass import KeptTeachers

SCORE_NAMES = ("student_logprobs", "student_entropy")
_SUPPORT_NAMES = ("support_divergence", "support_student_mass", "support_teacher_mass")


def value_names(settings: LossSettings, *, clipped: bool) -> tuple[str, ...]:
    """Names of the per-token values of a training micro-batch, the same on every rank and stage."""
    names = (*SCORE_NAMES, "losses", "advantages", "weights", "outside")
    if clipped:
        names += ("clipped",)
    if settings.has_support:
        names += _SUPPORT_NAMES
    if settings.reports_overlap:
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
    """The recipe's loss under the plan of the batch; the plan's arrays are on the device.

    teacher_logprobs_N: of the sampled tokens of the whole batch, on the device.
    """

    head: OutputHead
    temperature: float
    settings: LossSettings
    token_loss: TokenLoss
    plan: TokenPlan
    teacher_logprobs_N: torch.Tensor
    teachers: KeptTeachers = field(default_factory=KeptTeachers)

    def __call__(self, output: torch.Tensor, batch: DeviceMicroBatch) -> MicroResult:
        support, overlap_T = self._support(output, batch)
        inputs = TokenInputs(
            batch.behavior_logprobs_T,
            self._teacher_logprobs(batch),
            self._rows(self.plan.mask_N, batch),
            support=None if support is None else support[1],
            planned=self._planned(batch),
        )

        def loss(stats: TokenStats, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self._loss(stats, inputs.rows(rows))

        if batch.scorer and self.settings.has_full_support:
            loss_sum, parts = self._full_vocabulary(output, batch, inputs)
        else:
            ids_TJ = None if support is None else support[0].ids_TJ
            loss_sum, parts = self.head.loss(
                output, batch.target_ids_T, ids_TJ, self.temperature, loss
            )
        values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if overlap_T is not None:
            values["support_overlap"] = overlap_T
        return MicroResult(loss_sum, inputs.mask_T.sum(), values)

    def _loss(
        self, stats: TokenStats, inputs: TokenInputs
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        made = self.token_loss(stats, inputs)
        values = _student_values(stats) | {
            "losses": made.losses_T,
            "advantages": made.advantages_T,
            "weights": made.weights_T,
            "outside": made.outside_T,
            **made.extras,
        }
        return made.loss_sum, {name: value.detach() for name, value in values.items()}

    def _full_vocabulary(
        self, output: torch.Tensor, batch: DeviceMicroBatch, inputs: TokenInputs
    ) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """The loss with the divergence from all of the teacher's logits."""
        head, hidden_TH = self.teachers.of(batch)

        def loss(stats: DenseStats, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self._loss(
                stats.student, replace(inputs.rows(rows), divergence_T=stats.divergence_T)
            )

        return self.head.dense_loss(
            output,
            batch.target_ids_T,
            self.temperature,
            lambda rows: head.logits(hidden_TH[rows]).local_logits_TV,
            make_divergence(self.settings.objective),
            loss,
            teacher_temperature=head.temperature,
        )

    def _teacher_logprobs(self, batch: DeviceMicroBatch) -> torch.Tensor:
        """As they came with the batch, or as a teacher inside the learner found them."""
        if not batch.scorer:
            return batch.teacher_logprobs_T
        return self._rows(self.teacher_logprobs_N, batch)

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
            kept_mass_T=rows(plan.kept_mass_N),
        )

    def _support(
        self, output: torch.Tensor, batch: DeviceMicroBatch
    ) -> tuple[tuple[Support, SupportInputs] | None, torch.Tensor | None]:
        """Support and the teacher on it; the share of the teacher's top-K that is the student's too.

        The whole vocabulary has no list of ids: None.
        """
        if not self.settings.has_support:
            return None, None
        student_ids_TK = None
        if self.settings.student_topk:
            student_ids_TK = self.head.student_topk(output, self.settings.student_topk)
        if batch.scorer:
            support, topk_ids_TK = self._exact_support(batch, student_ids_TK)
        else:
            assert batch.topk_ids_TK is not None and batch.topk_logprobs_TK is not None
            topk_ids_TK = batch.topk_ids_TK
            support = served_support(
                self.settings.objective.support,
                vocab_size=self.head.vocab_size,
                topk_ids_TK=topk_ids_TK,
                topk_logprobs_TK=batch.topk_logprobs_TK,
                sampled_ids_T=batch.target_ids_T,
                sampled_logprobs_T=batch.teacher_logprobs_T,
                student_ids_TK=student_ids_TK,
            )
        if student_ids_TK is None or topk_ids_TK is None or not self.settings.reports_overlap:
            return support, None
        return support, is_member(topk_ids_TK, student_ids_TK).float().mean(1)

    def _exact_support(
        self, batch: DeviceMicroBatch, student_ids_TK: torch.Tensor | None
    ) -> tuple[tuple[Support, SupportInputs] | None, torch.Tensor | None]:
        """Support, and the teacher's top-K, from its logits, some rows at a time."""
        objective = self.settings.objective
        head, hidden_TH = self.teachers.of(batch)
        if self.settings.has_full_support:
            if student_ids_TK is None:
                return None, None
            ids = [logits.topk(objective.topk) for _, logits in head.chunks(hidden_TH)]
            return None, torch.cat(ids)
        parts = [
            support_of_logits(
                objective.support,
                logits,
                topk=objective.topk,
                sampled_ids_T=batch.target_ids_T[rows],
                student_ids_TK=None if student_ids_TK is None else student_ids_TK[rows],
            )
            for rows, logits in head.chunks(hidden_TH)
        ]
        supports, teachers, ids = zip(*parts, strict=True)
        support = Support(
            torch.cat([one.ids_TJ for one in supports]),
            torch.cat([one.valid_TJ for one in supports]),
        )
        inputs = SupportInputs(
            torch.cat([one.teacher_logprobs_TJ for one in teachers]), support.valid_TJ
        )
        return (support, inputs), torch.cat(ids)


@dataclass(frozen=True)
class MicroCompare:
    """Both KLs between student and teacher over the whole vocabulary, at temperature 1, without a loss."""

    head: OutputHead
    teachers: KeptTeachers
    divergences: dict[str, Divergence]

    def __call__(self, output: torch.Tensor, batch: DeviceMicroBatch) -> MicroResult:
        head, hidden_TH = self.teachers.of(batch)
        teacher_TV = head.logits(hidden_TH).local_logits_TV
        values: dict[str, torch.Tensor] = {}
        for name, divergence in self.divergences.items():
            _, (stats,) = self.head.dense_loss(
                output,
                batch.target_ids_T,
                1.0,
                teacher_TV.__getitem__,
                divergence,
                lambda stats, _: (stats.divergence_T.sum(), stats),
            )
            values |= {name: stats.divergence_T} | _student_values(stats.student)
        zero = output.new_zeros(())
        return MicroResult(zero, (batch.output_index_T >= 0).sum(), values)
