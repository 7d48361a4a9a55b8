"""Hidden states and output weight to a loss sum, with gradients made in the forward, chunk by chunk.

For each chunk of rows: logits (one matrix product), the caller's step, which adds to the loss and
overwrites the logits with their gradient, and from it the gradients of hidden states and weight (two
matrix products). Logits are never stored and never computed twice: three matrix products in all, and
one chunk of memory. Exact as long as the loss of a token needs nothing of tokens in other chunks.

The gradient of the hidden states is a sum over the vocabulary, so over the ranks: one all-reduce in
backward, or left to the caller, whose gather (sequence parallel: reduce-scatter) or copy (all-reduce)
of the hidden states does it.

`weight_main_grad` is added to in the forward, when a later factor can not be known. The factor must
then be 1, as in Megatron with per-token loss, where the division comes after the last micro-batch.

Left out: gradients of anything but hidden states and weight, double backward, activation
recomputation around it (which would run the forward twice and add to `weight_main_grad` twice).

Shape suffixes: T tokens, C tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.fused.head import Head, sum_over_ranks
from opd_megatron.losses.fused.row_gradient import statistics_dtype

# (rows, their logits [C, num_real]) -> (loss of the rows [], whether the logits are now its gradient)
ChunkStep = Callable[[slice, torch.Tensor], tuple[torch.Tensor, bool]]


@dataclass(frozen=True)
class _Work:
    """Everything of one call but the two tensors that are differentiated."""

    head: Head
    step: ChunkStep
    weight_main_grad: torch.Tensor | None
    reduce_hidden_grad: bool
    hidden_needs_grad: bool
    weight_needs_grad: bool


class _Chunks(torch.autograd.Function):
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
            loss, has_gradient = work.step(rows, logits_CV)
            loss_sum += loss
            if wanted and has_gradient:
                head.add_products(
                    rows, logits_CV, hidden_grad, weight_grad if work.weight_needs_grad else None
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


def check_loss(loss: object, rows: slice) -> torch.Tensor:
    """The loss of a chunk, which must be a sum.

    Raises:
        LossInputError: not a tensor, or not a scalar.
    """
    if isinstance(loss, torch.Tensor) and loss.shape == ():
        return loss
    seen = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
    raise LossInputError(
        f"chunk_loss: {seen} returned for rows {rows.start} to {rows.stop}, a tensor of shape [] "
        "(their sum) wanted"
    )


def run_chunks(
    hidden_TH: torch.Tensor,
    local_weight_VH: torch.Tensor,
    head: Head,
    step: ChunkStep,
    weight_main_grad: torch.Tensor | None,
    reduce_hidden_grad: bool,
) -> torch.Tensor:
    """Loss sum [] of all chunks, with the gradients of hidden states and weight attached."""
    enabled = torch.is_grad_enabled()
    work = _Work(
        head=head,
        step=step,
        weight_main_grad=weight_main_grad,
        reduce_hidden_grad=reduce_hidden_grad,
        hidden_needs_grad=enabled and hidden_TH.requires_grad,
        weight_needs_grad=enabled and local_weight_VH.requires_grad,
    )
    apply = cast(
        Callable[..., torch.Tensor],
        _Chunks.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    return apply(hidden_TH, local_weight_VH, work)
