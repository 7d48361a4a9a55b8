"""The row functions in plain torch, a block of rows at a time: the reference of the other backends.

See `rows` for the formulas. Extra memory: a few float32 copies of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from opd_megatron.losses.fused.row_gradient import LOG_FLOOR, RowGradient, statistics_dtype
from opd_megatron.losses.fused.shard import Moments

# Rows are worked on in blocks of about this many logits. On a CPU, 4 MiB of float32 stays near the
# caches and small next to the logits; a GPU needs more work a launch.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


def row_blocks(
    num_rows: int, num_columns: int, device: torch.device, block_elements: int | None = None
) -> Iterator[slice]:
    """Slices that cover the rows in blocks of about `block_elements`."""
    elements = BLOCK_ELEMENTS[device.type] if block_elements is None else block_elements
    step = max(1, elements // max(1, num_columns))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def pick(
    real_TV: torch.Tensor, local_ids_TJ: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """scale * logits at the columns, 0 where the column is -1."""
    if real_TV.shape[1] == 0:
        return torch.zeros(local_ids_TJ.shape, dtype=dtype, device=real_TV.device)
    picked_TJ = real_TV.gather(1, local_ids_TJ.clamp_min(0)).to(dtype) * scale
    return torch.where(local_ids_TJ >= 0, picked_TJ, torch.zeros_like(picked_TJ))


def moments(real_TV: torch.Tensor, local_ids_TJ: torch.Tensor, scale: float) -> Moments:
    """See `rows`."""
    dtype = statistics_dtype(real_TV.dtype)
    num_rows, num_columns = real_TV.shape
    max_T = real_TV.new_full((num_rows,), -math.inf, dtype=dtype)
    sum_T = torch.zeros_like(max_T)
    weighted_T = torch.zeros_like(max_T)
    if num_columns:
        for rows in row_blocks(num_rows, num_columns, real_TV.device):
            z = real_TV[rows].to(dtype, copy=True).mul_(scale)
            m = z.amax(-1)
            max_T[rows] = m
            # A row without mass must not compute -inf - -inf.
            z.sub_(torch.where(m == -math.inf, torch.zeros_like(m), m)[:, None])
            e = z.exp()
            sum_T[rows] = e.sum(-1)
            weighted_T[rows] = e.mul_(z.clamp_min_(LOG_FLOOR)).sum(-1)
    return Moments(max_T, sum_T, weighted_T, pick(real_TV, local_ids_TJ, scale, dtype))


def gradient(real_TV: torch.Tensor, out_TV: torch.Tensor, row: RowGradient, scale: float) -> None:
    """See `rows`."""
    num_rows, num_columns = real_TV.shape
    if num_columns == 0:
        return
    owned_TJ = row.local_ids_TJ >= 0
    columns_TJ = row.local_ids_TJ.clamp_min(0)
    sparse_TJ = torch.where(owned_TJ, row.grad_logprobs_TJ, torch.zeros_like(row.grad_logprobs_TJ))
    for rows in row_blocks(num_rows, num_columns, real_TV.device):
        logp = real_TV[rows].to(row.log_z_T.dtype, copy=True).mul_(scale)
        logp.sub_(row.log_z_T[rows, None])
        dz = logp.exp()
        centered = logp.clamp_min_(LOG_FLOOR).add_(row.entropy_T[rows, None])  # z - E
        dz.mul_(centered.mul_(-row.grad_entropy_T[rows, None]).add_(row.dense_T[rows, None]))
        dz.scatter_add_(1, columns_TJ[rows], sparse_TJ[rows])
        out_TV[rows] = dz.mul_(scale).to(out_TV.dtype)
