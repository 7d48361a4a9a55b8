"""Token filters: train only on tokens whose score lies in a percentile window of the global batch.

The percentile of a token is the share of kept tokens of the whole batch with a strictly smaller
score, times 100. A token passes if low <= percentile < high; high = 100 has no upper bound. So [0,
30), [30, 70) and [70, 100] split a batch without rest, and tokens with equal scores share their
fate. Nothing depends on order, so any split of the batch over micro-batches and ranks gives the
same mask, bit for bit.

Scores of the references: the sampled KL log(pi/q), student entropy, teacher entropy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import check_dtype, check_no_nan, check_shape


def gather_scores(
    scores_T: torch.Tensor, kept_T: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Scores of the kept tokens of all ranks, sorted, the same on every rank.

    Args:
        scores_T: [T] float of this rank's tokens.
        kept_T: [T] bool.
        group: all ranks that hold different tokens (data and context parallel); None for one rank.

    Returns:
        [N] sorted, N the number of kept tokens of the batch.
    """
    check_dtype("kept_T", kept_T, (torch.bool,))
    check_shape("kept_T", kept_T, tuple(scores_T.shape))
    mine = scores_T[kept_T]
    check_no_nan("scores_T", mine)
    world_size = 1 if group is None else dist.get_world_size(group)
    if world_size == 1:
        return mine.sort().values
    counts = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(world_size)]
    own = torch.tensor([len(mine)], device=mine.device)
    dist.all_gather(counts, own, group=group)  # pyright: ignore[reportUnknownMemberType]
    longest = max(int(count) for count in counts)
    padded = torch.zeros(longest, dtype=mine.dtype, device=mine.device)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)  # pyright: ignore[reportUnknownMemberType]
    kept = [part[: int(count)] for part, count in zip(parts, counts, strict=True)]
    return torch.cat(kept).sort().values


def percentile_window(
    scores_T: torch.Tensor,
    kept_T: torch.Tensor,
    sorted_scores_N: torch.Tensor,
    low: float,
    high: float,
) -> torch.Tensor:
    """Which of this rank's kept tokens pass.

    Args:
        scores_T, kept_T: [T], as given to `gather_scores`.
        sorted_scores_N: what `gather_scores` returned.
        low, high: percentiles, 0 <= low < high <= 100.

    Returns:
        [T] bool, False where `kept_T` is; all False for an empty batch.

    Raises:
        ConfigError: not a window.
    """
    if not 0.0 <= low < high <= 100.0:
        raise ConfigError.of(
            "filter window", (low, high), "must satisfy 0 <= low < high <= 100", "e.g. (0, 30)"
        )
    total = len(sorted_scores_N)
    smaller_T = torch.searchsorted(sorted_scores_N, scores_T.contiguous())
    # Counts are exact in float64, so a rank that computes this alone can not round differently.
    percentile_T = smaller_T.double() * 100.0
    passed_T = percentile_T >= low * total
    if high < 100.0:
        passed_T &= percentile_T < high * total
    return passed_T & kept_T
