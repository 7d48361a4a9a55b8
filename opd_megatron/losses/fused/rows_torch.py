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


def _scratch(real_TV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the largest block, for every block: fresh memory costs a CPU more than the arithmetic in it."""
    num_rows, num_columns = real_TV.shape
    largest = next(row_blocks(num_rows, num_columns, real_TV.device), slice(0, 0))
    return real_TV.new_empty((largest.stop, num_columns), dtype=dtype)


def _write_shifted(
    logits: torch.Tensor, shift_T: torch.Tensor, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """scale * logits - shift, written to `out` (which may be the logits) in as few passes as that takes."""
    source = logits if logits.dtype == out.dtype else out.copy_(logits)
    if scale != 1.0:
        source = torch.mul(source, scale, out=out)
    return torch.sub(source, shift_T[:, None], out=out)


def moments(real_TV: torch.Tensor, local_ids_TJ: torch.Tensor, scale: float) -> Moments:
    """See `rows`."""
    dtype = statistics_dtype(real_TV.dtype)
    num_rows, num_columns = real_TV.shape
    max_T = real_TV.new_full((num_rows,), -math.inf, dtype=dtype)
    sum_T = torch.zeros_like(max_T)
    weighted_T = torch.zeros_like(max_T)
    if num_columns:
        scratch_z, scratch_e = _scratch(real_TV, dtype), _scratch(real_TV, dtype)
        for rows in row_blocks(num_rows, num_columns, real_TV.device):
            block = real_TV[rows]
            m = block.amax(-1).to(dtype) * scale
            max_T[rows] = m
            # A row without mass must not compute -inf - -inf.
            shift = torch.where(m == -math.inf, 0.0, m)
            z = _write_shifted(block, shift, scale, scratch_z[: len(block)])
            e = torch.exp(z, out=scratch_e[: len(block)])
            sum_T[rows] = e.sum(-1)
            weighted_T[rows] = e.mul_(z.clamp_min_(LOG_FLOOR)).sum(-1)
    return Moments(max_T, sum_T, weighted_T, pick(real_TV, local_ids_TJ, scale, dtype))


def gradient(real_TV: torch.Tensor, out_TV: torch.Tensor, row: RowGradient, scale: float) -> None:
    """See `rows`."""
    num_rows, num_columns = real_TV.shape
    if num_columns == 0:
        return
    dtype = row.log_z_T.dtype
    owned_TJ = row.local_ids_TJ >= 0
    columns_TJ = row.local_ids_TJ.clamp_min(0)
    sparse_TJ = torch.where(owned_TJ, row.grad_logprobs_TJ, torch.zeros_like(row.grad_logprobs_TJ))
    # Most objectives have the entropy as a metric only; half of the passes are for its gradient.
    scratch_entropy = _scratch(real_TV, dtype) if bool(row.grad_entropy_T.any()) else None
    scratch = None if out_TV.dtype == dtype else _scratch(real_TV, dtype)
    for rows in row_blocks(num_rows, num_columns, real_TV.device):
        out = out_TV[rows]
        dz = out if scratch is None else scratch[: len(out)]
        factor = row.dense_T[rows, None]
        logp = _write_shifted(real_TV[rows], row.log_z_T[rows], scale, dz)
        if scratch_entropy is not None:
            centered = torch.clamp(logp, min=LOG_FLOOR, out=scratch_entropy[: len(out)])
            centered.add_(row.entropy_T[rows, None])  # z - E
            factor = centered.mul_(-row.grad_entropy_T[rows, None]).add_(factor)
        dz.exp_().mul_(factor).scatter_add_(1, columns_TJ[rows], sparse_TJ[rows])
        if scale != 1.0:
            dz.mul_(scale)
        if dz is not out:
            out.copy_(dz)
