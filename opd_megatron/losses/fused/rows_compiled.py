"""The row functions through torch.compile: one pass over the logits forward, one backward.

See `rows` for the formulas. The compiler keeps a row in registers and caches, so no float32 copy of
the logits exists. The first call of a process compiles (seconds to tens of seconds; the compiler
caches on disk) and on a CPU needs a C++ compiler; row counts are dynamic, so later shapes do not
compile again.
"""

from __future__ import annotations

import math

import torch

from opd_megatron.losses.fused.compiling import run_compiled
from opd_megatron.losses.fused.row_gradient import LOG_FLOOR, RowGradient, statistics_dtype
from opd_megatron.losses.fused.rows_torch import pick, row_blocks
from opd_megatron.losses.fused.shard import Moments
from opd_megatron.losses.fused.support_gradient import support_gradient, write_support_gradient

# One call of compiled code handles about this many logits: enough to amortise the call, and a bound
# on what the compiler may buffer.
BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}


def _moments(
    logits: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = logits.to(dtype) * scale
    m = z.amax(-1)
    d = z - torch.where(m == -math.inf, 0.0, m)[:, None]
    e = d.exp()
    return m, e.sum(-1), (e * d.clamp_min(LOG_FLOOR)).sum(-1)


def _write_dense(
    logits: torch.Tensor,
    out: torch.Tensor,
    log_z: torch.Tensor,
    entropy: torch.Tensor,
    dense: torch.Tensor,
    grad_entropy: torch.Tensor,
    scale: float,
) -> None:
    logp = logits.to(log_z.dtype) * scale - log_z[:, None]
    centered = logp.clamp_min(LOG_FLOOR) + entropy[:, None]
    dz = logp.exp() * (dense[:, None] - grad_entropy[:, None] * centered)
    out.copy_(dz * scale)


def moments(real_TV: torch.Tensor, local_ids_TJ: torch.Tensor, scale: float) -> Moments:
    """See `rows`."""
    dtype = statistics_dtype(real_TV.dtype)
    num_rows, num_columns = real_TV.shape
    max_T = real_TV.new_full((num_rows,), -math.inf, dtype=dtype)
    sum_T = torch.zeros_like(max_T)
    weighted_T = torch.zeros_like(max_T)
    if num_columns:
        block = BLOCK_ELEMENTS[real_TV.device.type]
        for rows in row_blocks(num_rows, num_columns, real_TV.device, block):
            found = run_compiled(_moments, (), real_TV[rows], scale, dtype)
            max_T[rows], sum_T[rows], weighted_T[rows] = found
    return Moments(max_T, sum_T, weighted_T, pick(real_TV, local_ids_TJ, scale, dtype))


def gradient(real_TV: torch.Tensor, out_TV: torch.Tensor, row: RowGradient, scale: float) -> None:
    """See `rows`."""
    num_rows, num_columns = real_TV.shape
    if num_columns == 0:
        return
    block = BLOCK_ELEMENTS[real_TV.device.type]
    vectors = (row.log_z_T, row.entropy_T, row.dense_T, row.grad_entropy_T)
    for rows in row_blocks(num_rows, num_columns, real_TV.device, block):
        run_compiled(
            _write_dense, (), real_TV[rows], out_TV[rows], *(x[rows] for x in vectors), scale
        )
    write_support_gradient(out_TV, row, support_gradient(row), scale)
