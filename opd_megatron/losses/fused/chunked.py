"""A token-local loss straight from hidden states: gradients are made in the forward, chunk by chunk.

For each chunk of rows: logits (one matrix product), statistics, the caller's loss on them, the
gradient of the logits in the logits' own buffer, and from it the gradients of hidden states and
weight (two matrix products). Logits are never stored and never computed twice: three matrix products
in all, and one chunk of memory. This is exact as long as the loss of a token needs nothing of tokens
in other chunks; a loss that does uses `recompute`. The global token count need not be known: the
result is a sum, and a factor applied to it later multiplies both gradients.

Collectives under tensor parallelism: two all-reduces a chunk (MAX of [C], SUM of [C, 3 + J]) in the
forward. The gradient of the hidden states is a sum over the vocabulary, so over the ranks: one
all-reduce in backward, or left to the caller, whose gather (sequence parallel: reduce-scatter) or
copy (all-reduce) of the hidden states does it.

`weight_main_grad` is added to in the forward, when a later factor can not be known. The factor must
then be 1, as in Megatron with per-token loss, where the division comes after the last micro-batch.

Left out: gradients of anything but hidden states and weight, double backward, activation
recomputation around it (which would run the forward twice and add to `weight_main_grad` twice).

Shape suffixes: T tokens, C tokens of a chunk, V vocabulary, H hidden, J ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.fused.head import Head, check_head, chunk_rows, sum_over_ranks
from opd_megatron.losses.fused.row_gradient import RowGradient, statistics_dtype
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
class _Work:
    """Everything of one call but the two tensors that are differentiated."""

    head: Head
    local_ids_TJ: torch.Tensor
    has_support: bool
    chunk_loss: Callable[[TokenStats, slice], tuple[torch.Tensor, Any]]
    allow_nan: bool
    weight_main_grad: torch.Tensor | None
    reduce_hidden_grad: bool
    hidden_needs_grad: bool
    weight_needs_grad: bool
    extras: list[Any] = field(default_factory=list[Any])


def _loss_and_gradient(
    work: _Work, merged: Merged, rows: slice
) -> tuple[torch.Tensor, RowGradient | None]:
    """The caller's loss of a chunk, and what the chunk's logits get from it (None: nothing)."""
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_()
            for x in (merged.log_z_T, merged.entropy_T, merged.logprobs_TJ)
        ]
        stats = stats_of(Merged(*leaves), work.has_support)
        loss, extra = work.chunk_loss(stats, rows)
        work.extras.append(extra)
        if not isinstance(loss, torch.Tensor) or loss.shape != ():  # pyright: ignore[reportUnnecessaryIsInstance]
            seen = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)  # pyright: ignore[reportUnnecessaryIsInstance]
            raise LossInputError(
                f"chunk_loss: {seen} returned for rows {rows.start} to {rows.stop}, a tensor of "
                "shape [] (their sum) wanted"
            )
        if not loss.requires_grad:
            return loss, None
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    row = RowGradient(
        log_z_T=merged.log_z_T,
        entropy_T=merged.entropy_T,
        dense_T=grads[0] - grads[2].sum(-1),
        grad_entropy_T=grads[1],
        local_ids_TJ=work.local_ids_TJ[rows],
        logprobs_TJ=merged.logprobs_TJ,
        grad_logprobs_TJ=grads[2],
    )
    return loss.detach(), row


class _ChunkedLoss(torch.autograd.Function):
    """(hidden, weight) -> loss sum; see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, local_weight_VH: torch.Tensor, work: _Work
    ) -> torch.Tensor:
        head = work.head
        loss_sum = hidden_TH.new_zeros((), dtype=statistics_dtype(hidden_TH.dtype))
        hidden_grad = torch.zeros_like(head.hidden_TH) if work.hidden_needs_grad else None
        weight_grad = work.weight_main_grad
        if weight_grad is None and work.weight_needs_grad:
            weight_grad = head.new_weight_grad()
        wanted = work.hidden_needs_grad or work.weight_needs_grad
        for rows, logits_CV in head.chunks():
            local_ids_CJ = work.local_ids_TJ[rows]
            moments = head.moments(logits_CV, local_ids_CJ)
            if not work.allow_nan:
                check_finite("logits of hidden_TH", moments, logits_CV.shape)
            merged = merge(moments, local_ids_CJ >= 0, head.shard)
            if not work.allow_nan:
                check_has_mass("logits of hidden_TH", merged, logits_CV.shape)
            loss, row = _loss_and_gradient(work, merged, rows)
            loss_sum += loss
            if wanted and row is not None:
                head.add_gradients(
                    rows,
                    logits_CV,
                    row,
                    hidden_grad,
                    weight_grad if work.weight_needs_grad else None,
                )
        ctx.work = work
        ctx.save_for_backward(
            hidden_grad, None if work.weight_main_grad is not None else weight_grad
        )
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, factor: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        work: _Work = ctx.work
        if work.weight_main_grad is not None:
            _check_one(factor)
        # The saved sums are scaled in place; a second backward raises torch's error about that.
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad.mul_(factor)
            if work.reduce_hidden_grad:
                sum_over_ranks(hidden_grad, work.head.shard.group)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(factor).to(work.head.local_weight_VH.dtype)
        return hidden_grad, weight_grad, None


def _check_one(factor: torch.Tensor) -> None:
    if factor.device.type != "cpu":
        # Without waiting for the device; a device-side assertion if it fails.
        torch._assert_async(factor == 1.0)  # pyright: ignore
    elif float(factor) != 1.0:
        raise LossInputError(
            f"gradient of loss_sum: {float(factor)} seen, 1.0 wanted, because weight_main_grad "
            "has been added to already; scale the accumulated gradient instead, or leave "
            "weight_main_grad out"
        )


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
    enabled = torch.is_grad_enabled()
    work = _Work(
        head=head,
        local_ids_TJ=shard.local_ids(ids_TJ),
        has_support=support_ids_TJ is not None,
        chunk_loss=chunk_loss,
        allow_nan=allow_nan,
        weight_main_grad=weight_main_grad,
        reduce_hidden_grad=reduce_hidden_grad,
        hidden_needs_grad=enabled and hidden_TH.requires_grad,
        weight_needs_grad=enabled and local_weight_VH.requires_grad,
    )
    apply = cast(
        Callable[..., torch.Tensor],
        _ChunkedLoss.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    return apply(hidden_TH, local_weight_VH, work), work.extras
