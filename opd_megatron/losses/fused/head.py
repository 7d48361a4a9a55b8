"""The output layer inside the loss: logits of one chunk of rows at a time, never all of them.

    logits_CV = hidden_CH @ weight_VH^T        dhidden_CH = dlogits_CV @ weight_VH
    dweight_VH += dlogits_CV^T @ hidden_CH     (float32, whatever the inputs are)

One buffer of [chunk, V / tp] in the inputs' dtype holds the logits and then their gradient. Padded
weight rows are neither multiplied nor given a gradient.

A chunk is as many rows as fit a target size: large enough for matrix products at full rate, small
next to what storing all logits takes. It depends on V / tp alone, so all ranks cut alike.

Left out: overlap of the products with the reductions of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.checks import LOGIT_DTYPES, LossInputError, check_dtype, check_shape
from opd_megatron.losses.fused.row_gradient import RowGradient, statistics_dtype
from opd_megatron.losses.fused.rows import RowFunctions
from opd_megatron.losses.fused.shard import Moments, Shard

# Bytes of one chunk's logits. CUDA: at V / tp = 151,936 in bfloat16 about 880 rows, 3,500 at tp = 4.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# A tile of the matrix product is at most this high.
_ROW_MULTIPLE = 128
# On a CPU the weight gradient is summed from float32 copies of this many columns.
_CPU_COLUMNS = 16_384


@dataclass(frozen=True)
class Head:
    """Hidden states, this rank's weight and how they are worked on.

    Attributes:
        hidden_TH, local_weight_VH: detached, same dtype.
        chunk_tokens: rows of a chunk.
        scale: 1 / temperature.
    """

    hidden_TH: torch.Tensor
    local_weight_VH: torch.Tensor
    shard: Shard
    chunk_tokens: int
    scale: float
    functions: RowFunctions

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, logits [C, num_real]); the logits live in one buffer, overwritten by the next."""
        num_tokens = self.hidden_TH.shape[0]
        buffer = self.hidden_TH.new_empty(min(self.chunk_tokens, num_tokens), self.shard.num_real)
        real_VH = self.local_weight_VH[: self.shard.num_real]
        for start in range(0, num_tokens, self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, num_tokens))
            logits_CV = buffer[: rows.stop - rows.start]
            torch.mm(self.hidden_TH[rows], real_VH.T, out=logits_CV)
            yield rows, logits_CV

    def moments(self, logits_CV: torch.Tensor, local_ids_CJ: torch.Tensor) -> Moments:
        """Local row sums of a chunk."""
        return self.functions.moments(logits_CV, local_ids_CJ, self.scale)

    def overwrite(self, logits_CV: torch.Tensor, row: RowGradient) -> None:
        """Replace a chunk's logits by their gradient."""
        self.functions.gradient(logits_CV, logits_CV, row, self.scale)

    def add_products(
        self,
        rows: slice,
        dlogits_CV: torch.Tensor,
        hidden_grad_TH: torch.Tensor | None,
        weight_grad_VH: torch.Tensor | None,
    ) -> None:
        """Pass the gradient of a chunk's logits on to hidden states and weight.

        hidden_grad_TH: its rows are set to this rank's part of the sum over the vocabulary.
        weight_grad_VH: float32 (float64), added to.
        """
        num_real = self.shard.num_real
        if hidden_grad_TH is not None:
            torch.mm(dlogits_CV, self.local_weight_VH[:num_real], out=hidden_grad_TH[rows])
        if weight_grad_VH is not None:
            _add_product(weight_grad_VH[:num_real], dlogits_CV, self.hidden_TH[rows])

    def new_weight_grad(self) -> torch.Tensor:
        """Zeros to add the weight's gradient to."""
        dtype = statistics_dtype(self.local_weight_VH.dtype)
        return torch.zeros_like(self.local_weight_VH, dtype=dtype)


def _add_product(sums_VH: torch.Tensor, dlogits_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """sums += dlogits^T hidden without rounding a chunk's product to the inputs' dtype."""
    if sums_VH.dtype == dlogits_CV.dtype:
        torch.addmm(sums_VH, dlogits_CV.T, hidden_CH, out=sums_VH)
    elif dlogits_CV.device.type == "cuda":
        torch.addmm(  # pyright: ignore[reportCallIssue]
            sums_VH,
            dlogits_CV.T,
            hidden_CH,
            out_dtype=sums_VH.dtype,  # pyright: ignore[reportArgumentType]
            out=sums_VH,
        )
    else:
        hidden_CH = hidden_CH.to(sums_VH.dtype)
        for start in range(0, dlogits_CV.shape[1], _CPU_COLUMNS):
            columns = slice(start, start + _CPU_COLUMNS)
            sums_VH[columns].addmm_(dlogits_CV[:, columns].T.to(sums_VH.dtype), hidden_CH)


def chunk_rows(local_weight_VH: torch.Tensor, chunk_tokens: int | None) -> int:
    """Rows of a chunk: as asked for, or by the target size.

    Raises:
        LossInputError: fewer than one row asked for.
    """
    if chunk_tokens is not None:
        if chunk_tokens < 1:
            raise LossInputError(f"chunk_tokens: {chunk_tokens} seen, at least 1 wanted")
        return chunk_tokens
    row_bytes = max(1, local_weight_VH.shape[0] * local_weight_VH.element_size())
    rows = max(1, _CHUNK_BYTES[local_weight_VH.device.type] // row_bytes)
    return max(_ROW_MULTIPLE, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)


def _check_all_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() == 0:
        return
    low, high = (float(x) for x in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise LossInputError(
            f"{name}: values in [{low}, {high}] seen (shape {list(tensor.shape)}), finite numbers "
            "wanted"
        )


def check_head(
    hidden_TH: torch.Tensor,
    local_weight_VH: torch.Tensor,
    weight_main_grad: torch.Tensor | None,
    allow_nan: bool,
) -> None:
    """Raise unless hidden states and weight fit together.

    Raises:
        LossInputError: wrong dtype or shape, or, unless `allow_nan`, a value that is not finite.
    """
    check_dtype("hidden_TH", hidden_TH, LOGIT_DTYPES)
    check_shape("hidden_TH", hidden_TH, ("T", "H"))
    check_dtype("local_weight_VH", local_weight_VH, (hidden_TH.dtype,))
    check_shape("local_weight_VH", local_weight_VH, ("V/tp", hidden_TH.shape[1]))
    if weight_main_grad is not None:
        wanted = statistics_dtype(hidden_TH.dtype)
        check_dtype("weight_main_grad", weight_main_grad, (wanted,))
        check_shape("weight_main_grad", weight_main_grad, tuple(local_weight_VH.shape))
    if not allow_nan:
        _check_all_finite("hidden_TH", hidden_TH.detach())
        _check_all_finite("local_weight_VH", local_weight_VH.detach())


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """All-reduce in place, nothing without a group."""
    if group is not None:
        dist.all_reduce(tensor, group=group)  # pyright: ignore[reportUnknownMemberType]
