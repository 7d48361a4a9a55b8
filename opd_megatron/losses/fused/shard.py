"""What one rank holds of a vocabulary-parallel matrix, and the checks and sums that all modes share.

Rank r of the tensor-parallel group holds the columns of the ids [r * v, (r + 1) * v). Ids from the
vocabulary size on are padding: they stand at the end, so a rank has `num_real` real columns first.

Statistics of a row split over ranks, from local max m, S = sum exp(z - m), W = sum exp(z - m)(z - m)
and the logits picked at the wanted ids: one MAX all-reduce gives M, then S and W are rescaled,

    S' = S e^(m - M),   W' = (W + (m - M) S) e^(m - M),   picked' = z - M where owned, else 0

and one SUM all-reduce of [S', W', picked'] completes them: log_z = M + log S, E = M + W / S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.checks import (
    LOGIT_DTYPES,
    LossInputError,
    check_device,
    check_dtype,
    check_ids,
    check_shape,
)


@dataclass(frozen=True)
class Shard:
    """This rank's columns: the ids [first_id, first_id + num_real), then padding.

    `group` is None where there is nobody to talk to.
    """

    first_id: int
    num_real: int
    group: dist.ProcessGroup | None

    def local_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Columns of this rank for global ids, -1 for ids of other ranks; int64."""
        local = ids.long() - self.first_id
        return torch.where((local >= 0) & (local < self.num_real), local, -1)


@dataclass(frozen=True)
class Moments:
    """Local sums of every row, float32 (float64 for float64 logits); (-inf, 0, 0) without mass.

    picked_TJ: z at the wanted columns, 0 where the column belongs to another rank.
    """

    max_T: torch.Tensor
    sum_T: torch.Tensor
    weighted_T: torch.Tensor
    picked_TJ: torch.Tensor


@dataclass(frozen=True)
class Merged:
    """Statistics of whole rows, equal on every rank."""

    log_z_T: torch.Tensor
    entropy_T: torch.Tensor
    logprobs_TJ: torch.Tensor


def make_shard(
    name: str, shape: torch.Size, local_size: int, vocab_size: int, group: dist.ProcessGroup | None
) -> Shard:
    """The shard of this rank.

    Raises:
        LossInputError: no vocabulary, or the ranks together hold fewer columns than it has ids.
    """
    if vocab_size < 1:
        raise LossInputError(f"vocab_size: {vocab_size} seen, at least 1 wanted")
    world_size = 1 if group is None else dist.get_world_size(group)
    if local_size * world_size < vocab_size:
        raise LossInputError(
            f"{name}: shape {list(shape)} on {world_size} rank(s) seen, "
            f"at least {-(-vocab_size // world_size)} columns a rank wanted, for {vocab_size} ids"
        )
    first_id = 0 if group is None else dist.get_rank(group) * local_size
    num_real = max(0, min(local_size, vocab_size - first_id))
    return Shard(first_id, num_real, group if world_size > 1 else None)


def check_logits(name: str, logits_TV: torch.Tensor) -> None:
    """Raise unless these are [T, V / tp] logits.

    Raises:
        LossInputError: wrong dtype or shape.
    """
    check_dtype(name, logits_TV, LOGIT_DTYPES)
    check_shape(name, logits_TV, ("T", "V/tp"))


def wanted_ids(
    num_tokens: int,
    target_ids_T: torch.Tensor,
    support_ids_TJ: torch.Tensor | None,
    vocab_size: int,
    device: torch.device,
) -> torch.Tensor:
    """[T, 1 + J] int64: the target id, then the support ids.

    Raises:
        LossInputError: wrong device, dtype or shape, or an id outside the vocabulary.
    """
    check_device("target_ids_T", target_ids_T, device)
    if support_ids_TJ is not None:
        check_device("support_ids_TJ", support_ids_TJ, device)
    check_shape("target_ids_T", target_ids_T, (num_tokens,))
    check_ids("target_ids_T", target_ids_T, vocab_size)
    ids_TJ = target_ids_T[:, None].long()
    if support_ids_TJ is None:
        return ids_TJ
    check_shape("support_ids_TJ", support_ids_TJ, (num_tokens, "J"))
    check_ids("support_ids_TJ", support_ids_TJ, vocab_size)
    return torch.cat([ids_TJ, support_ids_TJ.long()], dim=1)


def check_temperature(name: str, temperature: float) -> None:
    """Raise unless logits can be divided by it.

    Raises:
        LossInputError: not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise LossInputError(f"{name}: {temperature} seen, a positive finite number wanted")


def check_finite(name: str, moments: Moments, shape: torch.Size) -> None:
    """Raise on rows with NaN or +inf; looks at this rank's rows only.

    Raises:
        LossInputError: see above.
    """
    # NaN makes the sum NaN; +inf makes it NaN as well (inf - inf).
    bad_T = moments.sum_T.isnan()
    if bool(bad_T.any()):
        raise LossInputError(
            f"{name}: NaN or +inf seen in {int(bad_T.sum())} rows, first row "
            f"{int(bad_T.nonzero()[0])} (shape {list(shape)}), numbers below +inf wanted"
        )


def check_has_mass(name: str, merged: Merged, shape: torch.Size) -> None:
    """Raise on rows that are -inf everywhere; all ranks see the same rows and raise together.

    Raises:
        LossInputError: see above.
    """
    empty_T = merged.log_z_T == -math.inf
    if bool(empty_T.any()):
        raise LossInputError(
            f"{name}: no finite logit seen in {int(empty_T.sum())} rows, first row "
            f"{int(empty_T.nonzero()[0])} (shape {list(shape)} a rank), at least one a row wanted"
        )


def all_reduce(
    tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> None:
    """In place, nothing without a group."""
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)  # pyright: ignore[reportUnknownMemberType]


def rescaled(
    moments: Moments, max_T: torch.Tensor, owned_TJ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2] = S', W' and [T, J] = picked' relative to the maximum over all ranks."""
    # Without mass here the sums are 0; -inf - -inf must not be computed.
    no_mass_T = moments.max_T == -math.inf
    shift_T = torch.where(no_mass_T, torch.zeros_like(max_T), moments.max_T - max_T)
    sums = torch.stack([moments.sum_T, moments.weighted_T + shift_T * moments.sum_T], dim=1)
    picked_TJ = moments.picked_TJ - max_T[:, None]
    zeros = torch.zeros_like(picked_TJ)
    return sums * shift_T.exp()[:, None], torch.where(owned_TJ, picked_TJ, zeros)


def merge(moments: Moments, owned_TJ: torch.Tensor, shard: Shard) -> Merged:
    """Whole-row statistics: two all-reduces, MAX of [T] and SUM of [T, 2 + J]."""
    max_T = moments.max_T.clone()
    all_reduce(max_T, dist.ReduceOp.MAX, shard.group)
    packed = torch.cat(rescaled(moments, max_T, owned_TJ), dim=1)
    all_reduce(packed, dist.ReduceOp.SUM, shard.group)
    return completed(max_T, packed)


def completed(max_T: torch.Tensor, packed: torch.Tensor) -> Merged:
    """Statistics from the global maximum and the summed [T, 2 + J] of `rescaled`."""
    log_sum_T = packed[:, 0].log()
    return Merged(
        log_z_T=max_T + log_sum_T,
        entropy_T=log_sum_T - packed[:, 1] / packed[:, 0],
        logprobs_TJ=packed[:, 2:] - log_sum_T[:, None],
    )
