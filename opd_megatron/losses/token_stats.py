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
saved for backward is the logits themselves (no copy), the ids, the log-probs and two [T] vectors;
the working memory is one block of rows. Backward writes a tensor of the logits' size and dtype or,
with `grad_in_place`, over the logits.

Logits that are never stored: `fused.chunked` and `fused.recompute`. Against a teacher's full
vocabulary: `fused.dense`. Backends: `fused.rows`.

Left out: moments beyond the entropy, probabilities renormalised after top-p or top-k sampling, and
double backward.

Shape suffixes: T tokens, V vocabulary (`local_` means this rank's shard), J support entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.fused.row_gradient import RowGradient
from opd_megatron.losses.fused.rows import Backend, RowFunctions, row_functions
from opd_megatron.losses.fused.shard import (
    Merged,
    Shard,
    check_finite,
    check_has_mass,
    check_logits,
    check_temperature,
    make_shard,
    merge,
    wanted_ids,
)


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


def stats_of(merged: Merged, has_support: bool) -> TokenStats:
    """TokenStats from whole-row statistics whose first column of log-probs is the target's."""
    return TokenStats(
        log_z_T=merged.log_z_T,
        entropy_T=merged.entropy_T,
        sampled_logprobs_T=merged.logprobs_TJ[:, 0],
        support_logprobs_TJ=merged.logprobs_TJ[:, 1:] if has_support else None,
    )


def check_overwritable(name: str, logits_TV: torch.Tensor) -> None:
    """Raise unless a gradient may be written over the logits in backward.

    Raises:
        LossInputError: a leaf that needs a gradient, or a view of one (a parameter would lose its
            values), or elements that share memory.
    """
    if not logits_TV.requires_grad:
        return
    base = logits_TV if logits_TV.is_leaf else logits_TV._base  # pyright: ignore[reportPrivateUsage]
    if base is not None and base.is_leaf and base.requires_grad:
        raise LossInputError(
            f"{name}: a leaf tensor of shape {list(base.shape)} that requires a gradient, or a view "
            "of it, seen, the output of an operation wanted for grad_in_place, because backward "
            "overwrites it; set grad_in_place=False"
        )
    if _overlaps(logits_TV):
        raise LossInputError(
            f"{name}: elements that share memory (strides {list(logits_TV.stride())}, shape "
            f"{list(logits_TV.shape)}) seen, one with memory for every element wanted for "
            "grad_in_place; set grad_in_place=False"
        )


def _overlaps(matrix: torch.Tensor) -> bool:
    """Whether two elements of a matrix may lie at the same address."""
    (fine, columns), (coarse, _) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    if matrix.numel() < 2:
        return False
    return (fine == 0 and columns > 1) or coarse < fine * (columns - 1) + 1


def gradient_buffer(logits_TV: torch.Tensor, num_real: int, in_place: bool) -> torch.Tensor:
    """Where to write the gradient: the logits or a new tensor; 0 in the padded columns."""
    if in_place:
        # detach() shares the version counter, so a node that saved these logits and runs later
        # raises instead of reading gradients; so does a second backward.
        out_TV = logits_TV.detach()
        torch.autograd.graph.increment_version(out_TV)
    else:
        out_TV = torch.empty_like(logits_TV)
    out_TV[:, num_real:] = 0
    return out_TV


class _TokenStats(torch.autograd.Function):
    """(logits, ids) -> (log_z [T], entropy [T], logprobs [T, 1 + J]); see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        local_logits_TV: torch.Tensor,
        ids_TJ: torch.Tensor,
        shard: Shard,
        temperature: float,
        functions: RowFunctions,
        allow_nan: bool,
        grad_in_place: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        local_ids_TJ = shard.local_ids(ids_TJ)
        real_TV = local_logits_TV[:, : shard.num_real]
        moments = functions.moments(real_TV, local_ids_TJ, 1.0 / temperature)
        if not allow_nan:
            check_finite("local_logits_TV", moments, local_logits_TV.shape)
        merged = merge(moments, local_ids_TJ >= 0, shard)
        if not allow_nan:
            check_has_mass("local_logits_TV", merged, local_logits_TV.shape)
        outputs = (merged.log_z_T, merged.entropy_T, merged.logprobs_TJ)
        ctx.save_for_backward(local_logits_TV, local_ids_TJ, *outputs)
        ctx.num_real, ctx.scale, ctx.functions = shard.num_real, 1.0 / temperature, functions
        ctx.grad_in_place = grad_in_place
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_log_z_T, grad_entropy_T, grad_logprobs_TJ = grads
        logits_TV, local_ids_TJ, log_z_T, entropy_T, logprobs_TJ = ctx.saved_tensors
        row = RowGradient(
            log_z_T=log_z_T,
            entropy_T=entropy_T,
            dense_T=grad_log_z_T - grad_logprobs_TJ.sum(-1),
            grad_entropy_T=grad_entropy_T,
            local_ids_TJ=local_ids_TJ,
            logprobs_TJ=logprobs_TJ,
            grad_logprobs_TJ=grad_logprobs_TJ,
        )
        real = slice(0, ctx.num_real)
        out_TV = gradient_buffer(logits_TV, ctx.num_real, ctx.grad_in_place)
        ctx.functions.gradient(logits_TV.detach()[:, real], out_TV[:, real], row, ctx.scale)
        return out_TV, None, None, None, None, None, None


def token_stats(
    local_logits_TV: torch.Tensor,
    target_ids_T: torch.Tensor,
    *,
    support_ids_TJ: torch.Tensor | None = None,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    allow_nan: bool = False,
    backend: Backend = "auto",
    grad_in_place: bool = False,
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
        backend: see `fused.rows`.
        grad_in_place: backward overwrites the logits with their gradient and needs no memory of
            their size. Nothing may read the logits after that backward. Another autograd node that
            saved them and runs later raises torch's "modified by an inplace operation", and so does
            a second backward.

    Returns:
        TokenStats, float32 (float64 for float64 logits).

    Raises:
        LossInputError: wrong dtype or shape, id outside the vocabulary, NaN or +inf, or logits that
            can not be overwritten; raised before any collective.
        ConfigError: a backend that is unknown or can not run here.
    """
    check_logits("local_logits_TV", local_logits_TV)
    num_tokens, local_size = local_logits_TV.shape
    ids_TJ = wanted_ids(
        num_tokens, target_ids_T, support_ids_TJ, vocab_size, local_logits_TV.device
    )
    check_temperature("temperature", temperature)
    shard = make_shard("local_logits_TV", local_logits_TV.shape, local_size, vocab_size, group)
    if grad_in_place:
        check_overwritable("local_logits_TV", local_logits_TV)
    functions = row_functions(backend, local_logits_TV.device, local_logits_TV.dtype)
    apply = cast(
        Callable[..., tuple[torch.Tensor, ...]],
        _TokenStats.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    outputs = apply(
        local_logits_TV,
        ids_TJ,
        shard,
        float(temperature),
        functions,
        allow_nan,
        grad_in_place,
    )
    return stats_of(Merged(*outputs), support_ids_TJ is not None)
