"""The row functions as Triton kernels: one read of the logits forward, one read and write backward.

See `rows` for the formulas. float32 statistics from bfloat16, float16 or float32 logits.

Forward, one program a row, column blocks in turn with an online softmax: every lane keeps its own S
and W relative to the row's running maximum m, and only a block that raises m rescales them,

    S <- S e^(m - m'),   W <- (W + (m - m') S) e^(m - m'),   then   S += e^d,   W += e^d d,   d = z - m'

so a block costs one maximum over its lanes and no other exchange between threads. Then the same
program gathers z at the J wanted columns. Backward is elementwise over (row, column block); the
values at the wanted columns are computed apart from the log-probs of the forward, without reading
the logits (they may be overwritten already), and stored over the dense ones, so that they round
once: see `support_gradient` for the formula. It compares all pairs of the J ids of a row, which is
small next to a row of the vocabulary up to about a thousand ids.

Row offsets are 64-bit: T * V passes 2^31 at 14,134 tokens of a 151,936 vocabulary. Tiles are
constants, not tuned at run time, so that the same input gives the same bits.

The kernels also run on a CPU under Triton's interpreter (TRITON_INTERPRET=1 before this module is
imported), which is how they are tested where there is no GPU.
"""

# A kernel is not the Python function that it looks like to a type checker.
# pyright: basic, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from opd_megatron.losses.fused.row_gradient import RowGradient
from opd_megatron.losses.fused.shard import Moments

# Columns a program handles at once and warps it does it with; 16 elements a thread leave room in
# the registers for the two sums of a lane. Not tuned on a GPU yet.
_FORWARD_BLOCK, _FORWARD_WARPS = 4096, 8
_BACKWARD_BLOCK, _BACKWARD_WARPS = 4096, 8
# A tile of id pairs is _IDS x _PAIRS.
_IDS, _PAIRS = 64, 32


@triton.jit
def _moments_kernel(
    logits,
    stride_t,
    stride_v,
    num_columns,
    local_ids,
    num_ids,
    max_out,
    sum_out,
    weighted_out,
    picked_out,
    scale,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * stride_t
    lanes = tl.arange(0, BLOCK)
    # Lower than any logit; finite, so that a row without mass subtracts no infinities.
    m = tl.full((), -3.0e38, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        z = tl.load(
            row_start + columns.to(tl.int64) * stride_v,
            mask=columns < num_columns,
            other=-float("inf"),
        )
        z = z.to(tl.float32) * scale
        block_max = tl.max(z, axis=0)
        if block_max > m:
            shift = tl.maximum(m - block_max, -1000.0)  # e^-1000 is 0 and 0 * -1000 is 0
            factor = tl.exp(shift)
            weighted = (weighted + shift * sums) * factor
            sums = sums * factor
            m = block_max
        d = z - m
        e = tl.exp(d)
        sums += e
        # max(NaN, x) may be x, but e keeps the NaN.
        weighted += e * tl.maximum(d, -1000.0)
    total = tl.sum(sums, axis=0)
    tl.store(max_out + row, tl.where(total == 0.0, -float("inf"), m))
    tl.store(sum_out + row, total)
    tl.store(weighted_out + row, tl.sum(weighted, axis=0))
    for start in range(0, num_ids, IDS):
        entries = start + tl.arange(0, IDS)
        inside = entries < num_ids
        ids = tl.load(local_ids + row * num_ids + entries, mask=inside, other=-1)
        z = tl.load(row_start + ids * stride_v, mask=ids >= 0, other=0.0).to(tl.float32) * scale
        tl.store(picked_out + row * num_ids + entries, z, mask=inside)


@triton.jit
def _dense_gradient_kernel(
    logits,
    stride_t,
    stride_v,
    out,
    out_stride_t,
    out_stride_v,
    num_columns,
    num_blocks,
    log_z,
    entropy,
    dense,
    grad_entropy,
    scale,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // num_blocks
    columns = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    z = tl.load(logits + row * stride_t + columns * stride_v, mask=inside, other=0.0)
    logp = z.to(tl.float32) * scale - tl.load(log_z + row)
    centered = tl.maximum(logp, -1000.0) + tl.load(entropy + row)
    dz = tl.exp(logp) * (tl.load(dense + row) - tl.load(grad_entropy + row) * centered)
    values = (dz * scale).to(out.dtype.element_ty)
    tl.store(out + row * out_stride_t + columns * out_stride_v, values, mask=inside)


@triton.jit
def _support_gradient_kernel(
    out,
    out_stride_t,
    out_stride_v,
    local_ids,
    num_ids,
    logprobs,
    grad_logprobs,
    entropy,
    dense,
    grad_entropy,
    scale,
    IDS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * IDS + tl.arange(0, IDS)
    first = row * num_ids
    ids = tl.load(local_ids + first + entries, mask=entries < num_ids, other=-1)
    total = tl.zeros((IDS,), tl.float32)
    for start in range(0, num_ids, PAIRS):
        others = start + tl.arange(0, PAIRS)
        inside = others < num_ids
        other_ids = tl.load(local_ids + first + others, mask=inside, other=-2)
        g = tl.load(grad_logprobs + first + others, mask=inside, other=0.0)
        same = ids[:, None] == other_ids[None, :]
        total += tl.sum(tl.where(same, g[None, :], 0.0), axis=1)
    logp = tl.load(logprobs + first + entries, mask=ids >= 0, other=0.0)
    centered = tl.maximum(logp, -1000.0) + tl.load(entropy + row)
    dz = tl.exp(logp) * (tl.load(dense + row) - tl.load(grad_entropy + row) * centered) + total
    values = (dz * scale).to(out.dtype.element_ty)
    tl.store(out + row * out_stride_t + ids * out_stride_v, values, mask=ids >= 0)


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def moments(real_TV: torch.Tensor, local_ids_TJ: torch.Tensor, scale: float) -> Moments:
    """See `rows`."""
    num_rows, num_columns = real_TV.shape
    num_ids = local_ids_TJ.shape[1]
    sums_3T = torch.empty(3, num_rows, dtype=torch.float32, device=real_TV.device)
    picked_TJ = torch.empty(num_rows, num_ids, dtype=torch.float32, device=real_TV.device)
    if num_rows:
        with _on_device_of(real_TV):
            _moments_kernel[(num_rows,)](
                real_TV,
                *real_TV.stride(),
                num_columns,
                local_ids_TJ.contiguous(),
                num_ids,
                *sums_3T.unbind(),
                picked_TJ,
                scale,
                BLOCK=_FORWARD_BLOCK,
                IDS=_IDS,
                num_warps=_FORWARD_WARPS,
            )
    return Moments(*sums_3T.unbind(), picked_TJ)


def gradient(real_TV: torch.Tensor, out_TV: torch.Tensor, row: RowGradient, scale: float) -> None:
    """See `rows`."""
    num_rows, num_columns = real_TV.shape
    if num_rows == 0 or num_columns == 0:
        return
    with _on_device_of(real_TV):
        _write_gradient(real_TV, out_TV, row, scale)


def _write_gradient(
    real_TV: torch.Tensor, out_TV: torch.Tensor, row: RowGradient, scale: float
) -> None:
    num_rows, num_columns = real_TV.shape
    vectors = [x.contiguous() for x in (row.entropy_T, row.dense_T, row.grad_entropy_T)]
    num_blocks = triton.cdiv(num_columns, _BACKWARD_BLOCK)
    _dense_gradient_kernel[(num_rows * num_blocks,)](
        real_TV,
        *real_TV.stride(),
        out_TV,
        *out_TV.stride(),
        num_columns,
        num_blocks,
        row.log_z_T.contiguous(),
        *vectors,
        scale,
        BLOCK=_BACKWARD_BLOCK,
        num_warps=_BACKWARD_WARPS,
    )
    num_ids = row.local_ids_TJ.shape[1]
    if num_ids:
        _support_gradient_kernel[(num_rows, triton.cdiv(num_ids, _IDS))](
            out_TV,
            *out_TV.stride(),
            row.local_ids_TJ.contiguous(),
            num_ids,
            row.logprobs_TJ.contiguous(),
            row.grad_logprobs_TJ.contiguous(),
            *vectors,
            scale,
            IDS=_IDS,
            PAIRS=_PAIRS,
        )
