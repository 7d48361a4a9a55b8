"""The full-vocabulary divergence straight from hidden states: no logits of either model are stored.

`chunks` with the dense form of `dense`: a chunk's student logits are made by one matrix product, the
teacher's are asked for, the caller's loss on both is differentiated, and its gradient overwrites the
student's chunk. Memory: one chunk of each model's logits. Exact for losses that need nothing of tokens
in other chunks.

Collectives under tensor parallelism: three all-reduces a chunk in the forward (see `dense`), and what
`chunks` says in backward.

Shape suffixes: T tokens, C tokens of a chunk, V vocabulary, H hidden, J ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from opd_megatron.losses.checks import LOGIT_DTYPES, check_device, check_dtype, check_shape
from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.fused.chunks import check_loss, run_chunks
from opd_megatron.losses.fused.dense import DenseSettings, DenseStats, apply_dense
from opd_megatron.losses.fused.dense_rows import DenseRows
from opd_megatron.losses.fused.head import Head, check_head, chunk_rows
from opd_megatron.losses.fused.rows import Backend, row_functions
from opd_megatron.losses.fused.shard import check_temperature, make_shard, wanted_ids

Extra = TypeVar("Extra")


@dataclass(frozen=True)
class _DenseStep:
    """The divergence of a chunk, the caller's loss on it, and the gradient over the logits."""

    ids_TJ: torch.Tensor
    has_support: bool
    teacher_logits: Callable[[slice], torch.Tensor]
    settings: DenseSettings
    local_size: int
    chunk_loss: Callable[[DenseStats, slice], tuple[torch.Tensor, Any]]
    extras: list[Any] = field(default_factory=list[Any])

    def __call__(self, rows: slice, logits_CV: torch.Tensor) -> tuple[torch.Tensor, bool]:
        with torch.enable_grad():
            # A leaf over the chunk's own memory: its gradient is written there.
            leaf_CV = logits_CV.detach().requires_grad_()
            teacher_CV = self._teacher(rows, logits_CV)
            stats = apply_dense(
                leaf_CV, teacher_CV, self.ids_TJ[rows], self.settings, self.has_support
            )
            loss, extra = self.chunk_loss(stats, rows)
            self.extras.append(extra)
            if not check_loss(loss, rows).requires_grad:
                return loss, False
            torch.autograd.grad(loss, leaf_CV)
        return loss.detach(), True

    def _teacher(self, rows: slice, logits_CV: torch.Tensor) -> torch.Tensor:
        teacher_CV = self.teacher_logits(rows).detach()
        name = f"teacher_logits(rows {rows.start} to {rows.stop})"
        check_device(name, teacher_CV, logits_CV.device)
        check_dtype(name, teacher_CV, LOGIT_DTYPES)
        check_shape(name, teacher_CV, (rows.stop - rows.start, self.local_size))
        return teacher_CV[:, : self.settings.shard.num_real]


def chunked_dense_loss(
    hidden_TH: torch.Tensor,
    local_weight_VH: torch.Tensor,
    teacher_logits: Callable[[slice], torch.Tensor],
    target_ids_T: torch.Tensor,
    divergence: Divergence,
    chunk_loss: Callable[[DenseStats, slice], tuple[torch.Tensor, Extra]],
    *,
    support_ids_TJ: torch.Tensor | None = None,
    vocab_size: int,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    allow_nan: bool = False,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
    weight_main_grad: torch.Tensor | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[torch.Tensor, list[Extra]]:
    """Sum of a token-local loss over both models, with the student's gradients attached.

    Args:
        hidden_TH, local_weight_VH, target_ids_T, support_ids_TJ, vocab_size, temperature, group,
            allow_nan, backend, chunk_tokens, weight_main_grad, reduce_hidden_grad: as in
            `chunked_loss`.
        teacher_logits: rows -> [C, V / tp] of the teacher, sharded and padded as the student's; a slice
            of stored logits, or a matrix product with the teacher's own head. Called once a chunk, in
            order, on every rank.
        divergence, teacher_temperature: as in `dense_stats`.
        chunk_loss: (dense statistics of some rows, which rows) -> (sum of their loss, anything).

    Returns:
        loss_sum [], float32 (float64 for float64 inputs), and the second results in order.

    Raises:
        LossInputError: as `chunked_loss` and `dense_stats`; the teacher's logits are looked at when
            their chunk comes.
        ConfigError: a backend that is unknown or can not run here.
    """
    check_head(hidden_TH, local_weight_VH, weight_main_grad, allow_nan)
    num_tokens = hidden_TH.shape[0]
    ids_TJ = wanted_ids(num_tokens, target_ids_T, support_ids_TJ, vocab_size, hidden_TH.device)
    check_temperature("temperature", temperature)
    check_temperature("teacher_temperature", teacher_temperature)
    local_size = local_weight_VH.shape[0]
    shard = make_shard("local_weight_VH", local_weight_VH.shape, local_size, vocab_size, group)
    functions = row_functions(backend, hidden_TH.device, hidden_TH.dtype)
    rows = chunk_rows(local_weight_VH, chunk_tokens)
    head = Head(
        hidden_TH.detach(), local_weight_VH.detach(), shard, rows, 1.0 / temperature, functions
    )
    settings = DenseSettings(
        shard=shard,
        scales=(1.0 / temperature, 1.0 / teacher_temperature),
        functions=functions,
        rows=DenseRows(divergence, compiled=functions.name != "torch"),
        allow_nan=allow_nan,
        grad_in_place=True,
    )
    step = _DenseStep(
        ids_TJ, support_ids_TJ is not None, teacher_logits, settings, local_size, chunk_loss
    )
    loss_sum = run_chunks(
        hidden_TH, local_weight_VH, head, step, weight_main_grad, reduce_hidden_grad
    )
    return loss_sum, step.extras
