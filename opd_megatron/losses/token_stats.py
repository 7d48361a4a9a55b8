"""Per-token statistics of the student from vocabulary-parallel logits, one function for every loss.

With z = logits / temperature over the real vocabulary (no padded columns) and p = softmax(z):

    log_z   = log sum_v exp z_v
    entropy = log_z - E,  E = sum_v p_v z_v
    logprob of token j = z_j - log_z

Any loss that is a function of these (it may couple tokens) has the exact gradient

    dz_v = p_v (A - g_H (z_v - E)) + sum_j g_j 1[v = id_j],   A = g_Z - sum_j g_j

where g_Z, g_H, g_j are the loss's derivatives by log_z, entropy and the log-probs. Forward reads
the logits once and needs two all-reduces, MAX of [T] and one packed SUM of [T, 3 + J]; backward
needs none, because every rank holds the same statistics and the loss on them is replicated. What is
saved for backward is the logits themselves (no copy), the ids and two [T] vectors; the working
memory is one block of rows.

Left out: moments beyond the entropy, probabilities renormalised after top-p or top-k sampling, and
double backward.

Shape suffixes: T tokens, V vocabulary (`local_` means this rank's shard), J support entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.checks import (
    LOGIT_DTYPES,
    LossInputError,
    check_dtype,
    check_ids,
    check_shape,
)

# Rows are worked on in blocks of about this many logits. On a CPU, 4 MiB of float32 stays near the
# caches and small next to the logits; a GPU needs more work a launch.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
# exp underflows to exactly 0 below -104 (float32) and -746 (float64), so a log-prob clamped here
# never changes a product p * log p, but 0 * -inf can no longer happen.
_LOG_FLOOR = -1000.0


@dataclass(frozen=True)
class TokenStats:
    """What a loss may use of the student, at one temperature; float32 (float64 for float64 logits).

    Example: for logits [[0, 0]], target [1]: log_z = [0.693], entropy = [0.693],
    sampled_logprobs = [-0.693].
    """

    log_z_T: torch.Tensor
    entropy_T: torch.Tensor
    sampled_logprobs_T: torch.Tensor
    support_logprobs_TJ: torch.Tensor | None = None


def _row_blocks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS[device.type] // max(1, num_columns))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _local_moments(
    local_logits_TV: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Local max m, S = sum exp(z - m), W = sum exp(z - m)(z - m); (-inf, 0, 0) without mass."""
    num_rows, num_columns = local_logits_TV.shape
    max_T = local_logits_TV.new_full((num_rows,), -math.inf, dtype=dtype)
    sum_T = torch.zeros_like(max_T)
    weighted_T = torch.zeros_like(max_T)
    if num_columns == 0:
        return max_T, sum_T, weighted_T
    for rows in _row_blocks(num_rows, num_columns, local_logits_TV.device):
        z = local_logits_TV[rows].to(dtype, copy=True).mul_(scale)
        m = z.amax(-1)
        max_T[rows] = m
        # A row without mass must not compute -inf - -inf.
        z.sub_(torch.where(m == -math.inf, torch.zeros_like(m), m)[:, None])
        e = z.exp()
        sum_T[rows] = e.sum(-1)
        weighted_T[rows] = e.mul_(z.clamp_min_(_LOG_FLOOR)).sum(-1)
    return max_T, sum_T, weighted_T


def _picked(
    real_TV: torch.Tensor,
    ids_TJ: torch.Tensor,
    first_id: int,
    temperature: float,
    max_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z - max at the ids that this shard owns (0 elsewhere), their local columns, and ownership."""
    num_columns = real_TV.shape[1]
    local_ids_TJ = ids_TJ - first_id
    owned_TJ = (local_ids_TJ >= 0) & (local_ids_TJ < num_columns)
    if num_columns == 0:
        zeros = torch.zeros(ids_TJ.shape, dtype=max_T.dtype, device=max_T.device)
        return zeros, torch.zeros_like(local_ids_TJ), owned_TJ
    local_ids_TJ = local_ids_TJ.clamp(0, num_columns - 1)
    picked_TJ = real_TV.gather(1, local_ids_TJ).to(max_T.dtype) * (1.0 / temperature)
    picked_TJ = picked_TJ - max_T[:, None]
    return torch.where(owned_TJ, picked_TJ, torch.zeros_like(picked_TJ)), local_ids_TJ, owned_TJ


def _check_finite(local_max_T: torch.Tensor, shape: torch.Size) -> None:
    bad_T = ~(local_max_T < math.inf)  # true for NaN as well
    if bool(bad_T.any()):
        raise LossInputError(
            f"local_logits_TV: NaN or +inf seen in {int(bad_T.sum())} rows, first row "
            f"{int(bad_T.nonzero()[0])} (shape {list(shape)}), numbers below +inf wanted"
        )


def _all_reduce(
    tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup
) -> None:
    dist.all_reduce(tensor, op=op, group=group)  # pyright: ignore[reportUnknownMemberType]


class _TokenStats(torch.autograd.Function):
    """(logits, ids) -> (log_z [T], entropy [T], logprobs [T, 1 + J]); see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        local_logits_TV: torch.Tensor,
        ids_TJ: torch.Tensor,
        num_real_columns: int,
        first_id: int,
        temperature: float,
        group: dist.ProcessGroup | None,
        allow_nan: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if local_logits_TV.dtype == torch.float64 else torch.float32
        real_TV = local_logits_TV[:, :num_real_columns]
        local_max_T, sum_T, weighted_T = _local_moments(real_TV, 1.0 / temperature, dtype)
        if not allow_nan:
            _check_finite(local_max_T, local_logits_TV.shape)
        max_T = local_max_T.clone()
        if group is not None:
            _all_reduce(max_T, dist.ReduceOp.MAX, group)
        # Rescale this shard's sums from its own maximum to the global one; without mass they are 0.
        no_mass_T = local_max_T == -math.inf
        shift_T = torch.where(no_mass_T, torch.zeros_like(max_T), local_max_T - max_T)
        rescale_T = shift_T.exp()
        picked_TJ, local_ids_TJ, owned_TJ = _picked(real_TV, ids_TJ, first_id, temperature, max_T)
        moments_T2 = torch.stack([sum_T, weighted_T + shift_T * sum_T], dim=1) * rescale_T[:, None]
        packed = torch.cat([moments_T2, picked_TJ], dim=1)
        if group is not None:
            _all_reduce(packed, dist.ReduceOp.SUM, group)
        log_sum_T = packed[:, 0].log()
        entropy_T = log_sum_T - packed[:, 1] / packed[:, 0]
        log_z_T = max_T + log_sum_T
        ctx.save_for_backward(local_logits_TV, local_ids_TJ, owned_TJ, log_z_T, entropy_T)
        ctx.num_real_columns, ctx.temperature = num_real_columns, temperature
        return log_z_T, entropy_T, packed[:, 2:] - log_sum_T[:, None]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_log_z_T, grad_entropy_T, grad_logprobs_TJ = grads
        logits_TV, local_ids_TJ, owned_TJ, log_z_T, entropy_T = ctx.saved_tensors
        scale = 1.0 / ctx.temperature
        columns = slice(0, ctx.num_real_columns)
        dense_T = grad_log_z_T - grad_logprobs_TJ.sum(-1)
        sparse_TJ = torch.where(owned_TJ, grad_logprobs_TJ, torch.zeros_like(grad_logprobs_TJ))
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.num_real_columns :] = 0
        if ctx.num_real_columns > 0:
            for rows in _row_blocks(logits_TV.shape[0], ctx.num_real_columns, logits_TV.device):
                logp = logits_TV[rows, columns].to(log_z_T.dtype, copy=True).mul_(scale)
                logp.sub_(log_z_T[rows, None])
                dz = logp.exp()
                centered = logp.clamp_min_(_LOG_FLOOR).add_(entropy_T[rows, None])  # z - E
                dz.mul_(centered.mul_(-grad_entropy_T[rows, None]).add_(dense_T[rows, None]))
                dz.scatter_add_(1, local_ids_TJ[rows], sparse_TJ[rows])
                grad_TV[rows, columns] = dz.mul_(scale).to(grad_TV.dtype)
        return grad_TV, None, None, None, None, None, None


def token_stats(
    local_logits_TV: torch.Tensor,
    target_ids_T: torch.Tensor,
    *,
    support_ids_TJ: torch.Tensor | None = None,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    allow_nan: bool = False,
) -> TokenStats:
    """log Z, entropy and the log-probs of the target and support ids, differentiable by the logits.

    Rank r of `group` holds the ids [r * v, (r + 1) * v), v = local_logits_TV.shape[1]; global ids
    >= vocab_size are padding, without probability and with gradient 0. All ranks return the same.

    Args:
        local_logits_TV: [T, V / tp] bfloat16, float16, float32 or float64, before the temperature.
        target_ids_T: [T] int, the sampled tokens; any valid id where unused.
        support_ids_TJ: [T, J] int or None; duplicates are allowed and each gets its own gradient.
        vocab_size: number of real ids.
        temperature: the logits are divided by it.
        group: tensor-parallel group; None for unsharded logits.
        allow_nan: False raises on NaN or +inf in this rank's shard. True lets it turn the
            statistics of that token into NaN on every rank, for a caller that decides about a bad
            step collectively.

    Returns:
        TokenStats, float32 (float64 for float64 logits).

    Raises:
        LossInputError: wrong dtype or shape, id outside the vocabulary, NaN or +inf; raised before
            any collective.
    """
    check_dtype("local_logits_TV", local_logits_TV, LOGIT_DTYPES)
    check_shape("local_logits_TV", local_logits_TV, ("T", "V/tp"))
    num_tokens, local_size = local_logits_TV.shape
    check_shape("target_ids_T", target_ids_T, (num_tokens,))
    check_ids("target_ids_T", target_ids_T, vocab_size)
    ids_TJ = target_ids_T[:, None]
    if support_ids_TJ is not None:
        check_shape("support_ids_TJ", support_ids_TJ, (num_tokens, "J"))
        check_ids("support_ids_TJ", support_ids_TJ, vocab_size)
        ids_TJ = torch.cat([ids_TJ.long(), support_ids_TJ.long()], dim=1)
    if not temperature > 0 or math.isinf(temperature):
        raise LossInputError(f"temperature: {temperature} seen, a positive finite number wanted")
    world_size = 1 if group is None else dist.get_world_size(group)
    if local_size * world_size < vocab_size:
        raise LossInputError(
            f"local_logits_TV: shape {list(local_logits_TV.shape)} on {world_size} rank(s) seen, "
            f"at least {vocab_size} columns in total wanted"
        )
    first_id = 0 if group is None else dist.get_rank(group) * local_size
    num_real_columns = max(0, min(local_size, vocab_size - first_id))
    apply = cast(
        Callable[..., tuple[torch.Tensor, ...]],
        _TokenStats.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    log_z_T, entropy_T, logprobs_TJ = apply(
        local_logits_TV,
        ids_TJ.long(),
        num_real_columns,
        first_id,
        float(temperature),
        group if world_size > 1 else None,
        allow_nan,
    )
    return TokenStats(
        log_z_T=log_z_T,
        entropy_T=entropy_T,
        sampled_logprobs_T=logprobs_TJ[:, 0],
        support_logprobs_TJ=None if support_ids_TJ is None else logprobs_TJ[:, 1:],
    )
