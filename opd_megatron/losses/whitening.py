"""Whitening: values minus their mean, over their standard deviation, within a set of tokens.

    none      as they are
    sample    the tokens of one response
    group     the responses to one prompt
    batch     all tokens

A distillation advantage is not a reward with an arbitrary origin: its mean is the divergence that
is to go down. Whitening after the distillation term was added subtracts that signal (with one set a
batch, all of it). So a recipe whitens the task advantage, and anything else needs its permission
(combinations.py). Moments are returned, to be logged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.sequences import Sequences

# A set of equal values has no spread to divide by: it becomes zeros instead of noise over almost 0.
_LEAST_STD = 1e-6


@dataclass(frozen=True)
class Moments:
    """Of every set: mean_B, std_B (population), both [B]."""

    mean_B: torch.Tensor
    std_B: torch.Tensor


def _over_ranks(sums: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(sums, group=group)  # pyright: ignore[reportUnknownMemberType]
    return sums


def moments(
    values_T: torch.Tensor, sets: Sequences, group: dist.ProcessGroup | None = None
) -> Moments:
    """Mean and population standard deviation of each set; 0 for an empty one. See `whiten`."""
    sums_2B = torch.stack([sets.lengths(values_T.dtype), sets.sum(values_T)])
    count_B, total_B = _over_ranks(sums_2B, group)
    count_B = count_B.clamp_min(1)
    mean_B = total_B / count_B
    centered_T = values_T - sets.spread(mean_B)
    return Moments(mean_B, (_over_ranks(sets.sum(centered_T.square()), group) / count_B).sqrt())


def whiten(
    values_T: torch.Tensor, sets: Sequences, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, Moments]:
    """Zero mean and unit variance within each set.

    Args:
        values_T: [T].
        sets: which tokens belong together, numbered the same on every rank of `group`.
        group: the ranks that sets are spread over; None where every set is whole on its rank.

    Returns:
        [T], 0 at tokens in no set, and the moments before whitening.
    """
    found = moments(values_T, sets, group)
    centered_T = values_T - sets.spread(found.mean_B)
    std_T = sets.spread(found.std_B)
    # The bound scales with the values, so that rounding of large equal values is not blown up.
    least_T = _LEAST_STD * (1.0 + sets.spread(found.mean_B).abs())
    whitened_T = torch.where(std_T > least_T, centered_T / std_T.clamp_min(_LEAST_STD), 0.0)
    return torch.where(sets.kept_T, whitened_T, torch.zeros_like(values_T)), found
