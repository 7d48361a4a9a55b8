"""Token statistics straight from hidden states, for any loss: backward computes the logits again.

Forward goes over chunks of rows for the statistics alone and keeps hidden states, weight and a few
numbers a token; backward makes each chunk's logits once more, turns them into their gradient in
place and multiplies on. Four matrix products instead of the three of stored logits or of `chunked`,
one chunk of memory, and losses may couple tokens arbitrarily.

Collectives under tensor parallelism: two all-reduces forward, whatever the number of chunks. In
backward one, of the hidden states' gradient, or none where the caller reduces it.

Left out: double backward.

Shape suffixes: T tokens, C tokens of a chunk, V vocabulary, H hidden, J ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.fused.head import Head, check_head, chunk_rows, sum_over_ranks
from opd_megatron.losses.fused.row_gradient import RowGradient
from opd_megatron.losses.fused.rows import Backend, RowFunctions, row_functions
from opd_megatron.losses.fused.shard import (
    Merged,
    Moments,
    Shard,
    check_finite,
    check_has_mass,
    check_temperature,
    make_shard,
    merge,
    wanted_ids,
)
from opd_megatron.losses.token_stats import TokenStats, stats_of


@dataclass(frozen=True)
class _Settings:
    """What forward and backward share beside tensors."""

    shard: Shard
    chunk_tokens: int
    scale: float
    functions: RowFunctions
    allow_nan: bool
    weight_main_grad: torch.Tensor | None
    reduce_hidden_grad: bool

    def head(self, hidden_TH: torch.Tensor, local_weight_VH: torch.Tensor) -> Head:
        return Head(
            hidden_TH.detach(),
            local_weight_VH.detach(),
            self.shard,
            self.chunk_tokens,
            self.scale,
            self.functions,
        )


def _all_moments(head: Head, local_ids_TJ: torch.Tensor) -> Moments:
    parts = [head.moments(logits_CV, local_ids_TJ[rows]) for rows, logits_CV in head.chunks()] or [
        head.functions.moments(head.hidden_TH[:, :0], local_ids_TJ, head.scale)
    ]
    return Moments(
        torch.cat([part.max_T for part in parts]),
        torch.cat([part.sum_T for part in parts]),
        torch.cat([part.weighted_T for part in parts]),
        torch.cat([part.picked_TJ for part in parts]),
    )


class _RecomputeStats(torch.autograd.Function):
    """(hidden, weight, ids) -> (log_z [T], entropy [T], logprobs [T, 1 + J])."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        local_weight_VH: torch.Tensor,
        ids_TJ: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        local_ids_TJ = settings.shard.local_ids(ids_TJ)
        moments = _all_moments(settings.head(hidden_TH, local_weight_VH), local_ids_TJ)
        if not settings.allow_nan:
            shape = torch.Size((hidden_TH.shape[0], settings.shard.num_real))
            check_finite("logits of hidden_TH", moments, shape)
        merged = merge(moments, local_ids_TJ >= 0, settings.shard)
        if not settings.allow_nan:
            check_has_mass("logits of hidden_TH", merged, local_weight_VH.shape)
        outputs = (merged.log_z_T, merged.entropy_T, merged.logprobs_TJ)
        ctx.save_for_backward(hidden_TH, local_weight_VH, local_ids_TJ, *outputs)
        ctx.settings = settings
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_log_z_T, grad_entropy_T, grad_logprobs_TJ = grads
        hidden_TH, weight_VH, local_ids_TJ, log_z_T, entropy_T, logprobs_TJ = ctx.saved_tensors
        settings: _Settings = ctx.settings
        head = settings.head(hidden_TH, weight_VH)
        row = RowGradient(
            log_z_T=log_z_T,
            entropy_T=entropy_T,
            dense_T=grad_log_z_T - grad_logprobs_TJ.sum(-1),
            grad_entropy_T=grad_entropy_T,
            local_ids_TJ=local_ids_TJ,
            logprobs_TJ=logprobs_TJ,
            grad_logprobs_TJ=grad_logprobs_TJ,
        )
        hidden_grad = torch.zeros_like(head.hidden_TH) if ctx.needs_input_grad[0] else None
        weight_grad = settings.weight_main_grad if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[1] and weight_grad is None:
            weight_grad = head.new_weight_grad()
        for rows, logits_CV in head.chunks():
            head.overwrite(logits_CV, row.rows(rows))
            head.add_products(rows, logits_CV, hidden_grad, weight_grad)
        if hidden_grad is not None and settings.reduce_hidden_grad:
            sum_over_ranks(hidden_grad, settings.shard.group)
        if weight_grad is None or settings.weight_main_grad is not None:
            return hidden_grad, None, None, None
        return hidden_grad, weight_grad.to(weight_VH.dtype), None, None


def recompute_token_stats(
    hidden_TH: torch.Tensor,
    local_weight_VH: torch.Tensor,
    target_ids_T: torch.Tensor,
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
) -> TokenStats:
    """The statistics of `token_stats`, differentiable by hidden states and output weight.

    Args:
        hidden_TH: [T, H] floating, the same on every rank of `group`.
        local_weight_VH: [V / tp, H], same dtype; tied or not. Its gradient is summed in float32.
        target_ids_T, support_ids_TJ, vocab_size, temperature, group, backend: as in `token_stats`.
        allow_nan: False raises where hidden states, weight or logits are not finite; True lets it
            make the statistics of that token NaN on every rank.
        chunk_tokens: rows of a chunk; None takes 256 MiB of logits on CUDA and 64 MiB on a CPU.
        weight_main_grad: [V / tp, H] float32; backward adds the weight's gradient here and the
            weight itself gets none.
        reduce_hidden_grad: True sums the gradient of hidden_TH over `group` in backward; False
            leaves this rank's part of the sum, for a caller whose own backward reduces it.

    Returns:
        TokenStats, float32 (float64 for float64 inputs).

    Raises:
        LossInputError: wrong dtype or shape, id outside the vocabulary, or numbers that are not
            finite; raised before any collective.
        ConfigError: a backend that is unknown or can not run here.
    """
    check_head(hidden_TH, local_weight_VH, weight_main_grad, allow_nan)
    ids_TJ = wanted_ids(
        hidden_TH.shape[0], target_ids_T, support_ids_TJ, vocab_size, hidden_TH.device
    )
    check_temperature("temperature", temperature)
    local_size = local_weight_VH.shape[0]
    settings = _Settings(
        shard=make_shard("local_weight_VH", local_weight_VH.shape, local_size, vocab_size, group),
        chunk_tokens=chunk_rows(local_weight_VH, chunk_tokens),
        scale=1.0 / temperature,
        functions=row_functions(backend, hidden_TH.device, hidden_TH.dtype),
        allow_nan=allow_nan,
        weight_main_grad=weight_main_grad,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    apply = cast(
        Callable[..., tuple[torch.Tensor, ...]],
        _RecomputeStats.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    outputs = apply(hidden_TH, local_weight_VH, ids_TJ, settings)
    return stats_of(Merged(*outputs), support_ids_TJ is not None)
