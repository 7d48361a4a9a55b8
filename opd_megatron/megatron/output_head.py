"""From the last stage's hidden states to token statistics: which of the fused modes runs.

    stored      Megatron's output layer makes the logits; the gradient is a second tensor of their size
    in_place    the same; the gradient overwrites the logits
    chunked     no logits are stored: chunks of hidden states through the output weight, gradients made
                in the forward; three matrix products, as above
    recompute   no logits are stored; backward makes them again, four matrix products

In the last two the output layer hands its input through, and the weight's gradient goes straight into
Megatron's float32 buffer; where Megatron reduces gradients while backward runs, it is told so. Every
loss here is token-local once the batch is planned, so `chunked` is exact for all of them; what needs
the logits themselves is refused: the student's own top-K in both, the divergence over the whole
vocabulary in `recompute`.

Shape suffixes: B rows of S tokens are the T tokens of this rank's micro-batch (B is 1 where documents lie end to
end; under sequence parallel S is a tp-th of a row), H hidden, V vocabulary, J support ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.fused.chunked import chunked_loss
from opd_megatron.losses.fused.dense import DenseStats, dense_stats
from opd_megatron.losses.fused.dense_chunked import chunked_dense_loss
from opd_megatron.losses.fused.recompute import recompute_token_stats
from opd_megatron.losses.fused.rows import Backend
from opd_megatron.losses.token_stats import TokenStats, token_stats
from opd_megatron.losses.vocab_topk import vocab_topk
from opd_megatron.megatron.parallel import Groups

Extra = TypeVar("Extra")
HIDDEN_MODES = ("chunked", "recompute")


@dataclass
class OutputHead:
    """Of one learner rank; used on the last pipeline stage only.

    Attributes:
        mode, backend: see the module docstring and `losses.fused.rows`.
        overlaps_reduction: gradients are reduced while backward runs.
        weight: [V / tp, H] of the last micro-batch, set by the output layer in the hidden modes.
    """

    mode: str
    backend: Backend
    vocab_size: int
    groups: Groups
    sequence_parallel: bool
    overlaps_reduction: bool = False
    weight: torch.Tensor | None = None

    def attach(self, module: GPTModel) -> None:
        """Let the output layer of a hidden mode hand its input through."""
        if self.mode not in HIDDEN_MODES or not module.post_process:
            return
        layer: Any = module.output_layer
        # A weight that is the embedding too has a gradient of its own from there.
        if module.share_embeddings_and_output_weights and module.pre_process:
            self.overlaps_reduction = False

        def hand_through(
            hidden: torch.Tensor, weight: torch.Tensor | None = None, **_: Any
        ) -> tuple[torch.Tensor, None]:
            # Tied embeddings come as an argument, an output weight of its own lies in the layer.
            self.weight = layer.weight if weight is None else weight
            return hidden, None

        layer.forward = hand_through

    def loss(
        self,
        output: torch.Tensor,
        target_ids_T: torch.Tensor,
        support_ids_TJ: torch.Tensor | None,
        temperature: float,
        token_loss: Callable[[TokenStats, slice], tuple[torch.Tensor, Extra]],
    ) -> tuple[torch.Tensor, list[Extra]]:
        """The sum of a token-local loss and its second results, in order of rows.

        Args:
            output: what the model returned, [B, S, V / tp] or [B, S, H].
            token_loss: (statistics of some rows, which rows) -> (their sum, anything).
        """
        if self.mode == "chunked" and torch.is_grad_enabled():
            hidden_TH, weight = self._hidden(output)
            return chunked_loss(
                hidden_TH,
                weight,
                target_ids_T,
                token_loss,
                support_ids_TJ=support_ids_TJ,
                vocab_size=self.vocab_size,
                temperature=temperature,
                group=self.groups.tp_or_none,
                allow_nan=True,
                backend=self.backend,
                weight_main_grad=self._main_grad(),
                reduce_hidden_grad=not self.sequence_parallel,
            )
        stats = self.stats(output, target_ids_T, support_ids_TJ, temperature)
        loss_sum, extra = token_loss(stats, slice(0, len(target_ids_T)))
        return loss_sum, [extra]

    def stats(
        self,
        output: torch.Tensor,
        target_ids_T: torch.Tensor,
        support_ids_TJ: torch.Tensor | None,
        temperature: float,
    ) -> TokenStats:
        """Statistics of all rows, differentiable by the output."""
        if self.mode not in HIDDEN_MODES:
            return token_stats(
                _flat(output),
                target_ids_T,
                support_ids_TJ=support_ids_TJ,
                vocab_size=self.vocab_size,
                temperature=temperature,
                group=self.groups.tp_or_none,
                allow_nan=True,
                backend=self.backend,
                grad_in_place=self.mode == "in_place" and output.requires_grad,
            )
        hidden_TH, weight = self._hidden(output)
        return recompute_token_stats(
            hidden_TH,
            weight,
            target_ids_T,
            support_ids_TJ=support_ids_TJ,
            vocab_size=self.vocab_size,
            temperature=temperature,
            group=self.groups.tp_or_none,
            allow_nan=True,
            backend=self.backend,
            weight_main_grad=self._main_grad() if torch.is_grad_enabled() else None,
            reduce_hidden_grad=not self.sequence_parallel,
        )

    def dense_loss(
        self,
        output: torch.Tensor,
        target_ids_T: torch.Tensor,
        temperature: float,
        teacher_logits: Callable[[slice], torch.Tensor],
        divergence: Divergence,
        token_loss: Callable[[DenseStats, slice], tuple[torch.Tensor, Extra]],
        teacher_temperature: float = 1.0,
    ) -> tuple[torch.Tensor, list[Extra]]:
        """As `loss`, with the divergence from a teacher over the whole vocabulary among the statistics.

        Args:
            teacher_logits: rows -> their [C, V / tp]; in the mode `chunked` a chunk at a time.
        """
        if self.mode == "chunked" and torch.is_grad_enabled():
            hidden_TH, weight = self._hidden(output)
            return chunked_dense_loss(
                hidden_TH,
                weight,
                teacher_logits,
                target_ids_T,
                divergence,
                token_loss,
                vocab_size=self.vocab_size,
                temperature=temperature,
                teacher_temperature=teacher_temperature,
                group=self.groups.tp_or_none,
                allow_nan=True,
                backend=self.backend,
                weight_main_grad=self._main_grad(),
                reduce_hidden_grad=not self.sequence_parallel,
            )
        everything = slice(0, len(target_ids_T))
        stats = dense_stats(
            self._logits(output),
            teacher_logits(everything),
            target_ids_T,
            divergence,
            vocab_size=self.vocab_size,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            group=self.groups.tp_or_none,
            allow_nan=True,
            backend=self.backend,
            grad_in_place=self.mode == "in_place" and output.requires_grad,
        )
        loss_sum, extra = token_loss(stats, everything)
        return loss_sum, [extra]

    def _logits(self, output: torch.Tensor) -> torch.Tensor:
        """[T, V / tp] of all rows; the hidden modes make them where no gradient is wanted."""
        if self.mode not in HIDDEN_MODES:
            return _flat(output)
        assert not torch.is_grad_enabled(), "loss_checks.py refuses this combination"
        hidden_TH, weight = self._hidden(output)
        return hidden_TH @ weight.T

    def student_topk(self, output: torch.Tensor, k: int) -> torch.Tensor:
        """[T, k] ids of the student's most likely tokens; the modes with logits only."""
        assert self.mode not in HIDDEN_MODES, "rules.py refuses this combination"
        return vocab_topk(
            _flat(output), k, vocab_size=self.vocab_size, group=self.groups.tp_or_none
        )

    def _hidden(self, output_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.weight is not None, "the output layer ran before"
        weight = self.weight
        if self.overlaps_reduction and torch.is_grad_enabled():
            weight = _InMainGrad.apply(weight)
        return hidden_rows(output_BSH, self.groups.tp if self.sequence_parallel else None), weight

    def _main_grad(self) -> torch.Tensor:
        """Megatron's float32 gradient of the weight, which its data-parallel reduction reads."""
        return self.weight.main_grad  # type: ignore[union-attr, no-any-return]


def _flat(output_BSV: torch.Tensor) -> torch.Tensor:
    """[T, V]: a view, the backward of indexing would allocate the logits a second time."""
    return output_BSV.flatten(0, 1)


def hidden_rows(
    output_BSH: torch.Tensor, sequence_parallel: dist.ProcessGroup | None
) -> torch.Tensor:
    """[T, H] of what a handed-through output layer got, gathered over the ranks among which each row is cut.

    The backward of gathering is a reduce-scatter: each rank's gradient is a part of the sum.
    """
    if sequence_parallel is None:
        return _flat(output_BSH)
    gathered_SBH = gather_from_sequence_parallel_region(
        output_BSH.transpose(0, 1).contiguous(),
        tensor_parallel_output_grad=True,
        group=sequence_parallel,
    )
    return _flat(gathered_SBH.transpose(0, 1))


class _InMainGrad(torch.autograd.Function):
    """The weight itself; backward tells Megatron that its gradient is in `main_grad` already.

    Megatron's hook, which reduces gradients while backward runs, refuses a weight without a gradient. The one that it
    gets here is a zero that takes no memory, and is not added (`grad_added_to_main_grad`).
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> None:
        weight: Any = ctx.weight
        weight.grad = weight.new_zeros(()).expand_as(weight)
        weight.grad_added_to_main_grad = True


def make_output_head(
    learner: LearnerConfig, vocab_size: int, groups: Groups, modules: list[GPTModel]
) -> OutputHead:
    """The head of a recipe, attached to the last chunk of this stage."""
    head = OutputHead(
        mode=learner.loss_mode,
        backend=learner.loss_backend,  # type: ignore[arg-type]
        vocab_size=vocab_size,
        groups=groups,
        sequence_parallel=learner.sequence_parallel,
        # Both overlap, or neither (model.py).
        overlaps_reduction=learner.overlap_param_gather,
    )
    head.attach(modules[-1])
    return head
