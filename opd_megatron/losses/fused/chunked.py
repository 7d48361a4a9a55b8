"""A token-local loss straight from hidden states: `chunks` with the statistics of `token_stats`.

This is exact as long as the loss of a token needs nothing of tokens in other chunks; a loss that does
uses `recompute`. The global token count need not be known: the result is a sum, and a factor applied
to it later multiplies both gradients.

Collectives under tensor parallelism: two all-reduces a chunk (MAX of [C], SUM of [C, 3 + J]) in the
forward, and what `chunks` says in backward.

Shape suffixes: T tokens, C tokens of a chunk, V vocabulary, H hidden, J ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from opd_megatron.losses.fused.chunks import check_loss, run_chunks
from opd_megatron.losses.fused.head import Head, check_head, chunk_rows
from opd_megatron.losses.fused.row_gradient import RowGradient
from opd_megatron.losses.fused.rows import Backend, row_functions
from opd_megatron.losses.fused.shard import (
    Merged,
    check_finite,
    check_has_mass,
    check_temperature,
    make_shard,
    merge,
    wanted_ids,
)
from opd_megatron.losses.token_stats import TokenStats, stats_of

Extra = TypeVar("Extra")


@dataclass(frozen=True)
class _StatisticsStep:
    """Statistics of a chunk, the caller's loss on them, and the gradient over the logits."""

    head: Head
    local_ids_TJ: torch.Tensor
    has_support: bool
    chunk_loss: Callable[[TokenStats, slice], tuple[torch.Tensor, Any]]
    allow_nan: bool
    extras: list[Any] = field(default_factory=list[Any])

    def __call__(self, rows: slice, logits_CV: torch.Tensor) -> tuple[torch.Tensor, bool]:
        local_ids_CJ = self.local_ids_TJ[rows]
        moments = self.head.moments(logits_CV, local_ids_CJ)
        if not self.allow_nan:
            check_finite("logits of hidden_TH", moments, logits_CV.shape)
        merged = merge(moments, local_ids_CJ >= 0, self.head.shard)
        if not self.allow_nan:
            check_has_mass("logits of hidden_TH", merged, logits_CV.shape)
        loss, row = self._loss_and_gradient(merged, rows)
        if row is not None:
            self.head.overwrite(logits_CV, row)
        return loss, row is not None

    def _loss_and_gradient(
        self, merged: Merged, rows: slice
    ) -> tuple[torch.Tensor, RowGradient | None]:
        """The caller's loss, and what the logits get from it (None: nothing)."""
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_()
                for x in (merged.log_z_T, merged.entropy_T, merged.logprobs_TJ)
            ]
            loss, extra = self.chunk_loss(stats_of(Merged(*leaves), self.has_support), rows)
            self.extras.append(extra)
            if not check_loss(loss, rows).requires_grad:
                return loss, None
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        row = RowGradient(
            log_z_T=merged.log_z_T,
            entropy_T=merged.entropy_T,
            dense_T=grads[0] - grads[2].sum(-1),
            grad_entropy_T=grads[1],
            local_ids_TJ=self.local_ids_TJ[rows],
            logprobs_TJ=merged.logprobs_TJ,
            grad_logprobs_TJ=grads[2],
        )
        return loss.detach(), row


def chunked_loss(
    hidden_TH: torch.Tensor,
    local_weight_VH: torch.Tensor,
    target_ids_T: torch.Tensor,
    chunk_loss: Callable[[TokenStats, slice], tuple[torch.Tensor, Extra]],
    *,
    support_ids_TJ: torch.Tensor | None = None,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    allow_nan: bool = False,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
    weight_main_grad: torch.Tensor | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[torch.Tensor, list[Extra]]:
    """Sum of a token-local loss, with the gradients of hidden states and weight attached.

    Args:
        hidden_TH: [T, H] floating, the same on every rank of `group`.
        local_weight_VH: [V / tp, H], same dtype; tied or not. Its gradient is summed in float32.
        target_ids_T, support_ids_TJ, vocab_size, temperature, group, backend: as in `token_stats`.
        chunk_loss: (statistics of some rows, which rows) -> (sum of their loss, anything). Called
            once a chunk, in order. It differentiates through the statistics only and needs nothing
            of other chunks. Detach what the second result keeps.
        allow_nan: False raises where hidden states, weight or logits are not finite; the first two
            before any collective. True lets it make the statistics of that token NaN.
        chunk_tokens: rows of a chunk; None takes 256 MiB of logits on CUDA and 64 MiB on a CPU.
        weight_main_grad: [V / tp, H] float32; the weight's gradient is added here during this call
            and the weight itself gets none. Backward must then come with a factor of 1.
        reduce_hidden_grad: True sums the gradient of hidden_TH over `group` in backward; False
            leaves this rank's part of the sum, for a caller whose own backward reduces it.

    Returns:
        loss_sum [], float32 (float64 for float64 inputs), and the second results in order.

    Raises:
        LossInputError: wrong dtype or shape, id outside the vocabulary, numbers that are not
            finite, or a loss that is not a scalar.
        ConfigError: a backend that is unknown or can not run here.
    """
    check_head(hidden_TH, local_weight_VH, weight_main_grad, allow_nan)
    ids_TJ = wanted_ids(
        hidden_TH.shape[0], target_ids_T, support_ids_TJ, vocab_size, hidden_TH.device
    )
    check_temperature("temperature", temperature)
    local_size = local_weight_VH.shape[0]
    shard = make_shard("local_weight_VH", local_weight_VH.shape, local_size, vocab_size, group)
    head = Head(
        hidden_TH.detach(),
        local_weight_VH.detach(),
        shard,
        chunk_rows(local_weight_VH, chunk_tokens),
        1.0 / temperature,
        row_functions(backend, hidden_TH.device, hidden_TH.dtype),
    )
    step = _StatisticsStep(
        head, shard.local_ids(ids_TJ), support_ids_TJ is not None, chunk_loss, allow_nan
    )
    loss_sum = run_chunks(
        hidden_TH, local_weight_VH, head, step, weight_main_grad, reduce_hidden_grad
    )
    return loss_sum, step.extras
