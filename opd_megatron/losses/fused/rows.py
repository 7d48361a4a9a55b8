"""The two row functions that every mode is made of, and which implementation runs them.

    moments    one read of z = scale * logits: max m, S = sum e^(z-m), W = sum e^(z-m) (z-m), and z
               at the wanted columns
    gradient   dz = scale * (p (A - g_H (log p + H)) + sum_j g_j 1[v = id_j]), p = e^(z - log_z),
               written to `out`, which may be the logits themselves

| backend  | where | what |
|---|---|---|
| torch    | anywhere, any dtype | eager, a block of rows at a time; what the others are tested against |
| compiled | anywhere; a C++ compiler on the CPU | torch.compile of the same formulas, one pass |
| triton   | CUDA, or the CPU under TRITON_INTERPRET=1; float32 statistics | one online-softmax read |

`auto` is triton on CUDA (torch for float64, which only tests use) and torch on the CPU: a CPU runs
tests and demos, where tens of seconds of compilation cost more than they bring.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.fused.row_gradient import RowGradient
from opd_megatron.losses.fused.shard import Moments

Backend = Literal["auto", "torch", "compiled", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "compiled", "triton")


@dataclass(frozen=True)
class RowFunctions:
    """One backend.

    Attributes:
        name: never `auto`.
        moments: (logits [T, num_real], columns [T, J] int64 or -1, scale) -> Moments.
        gradient: (logits, out of the same shape, RowGradient, scale); fills `out`.
    """

    name: Backend
    moments: Callable[[torch.Tensor, torch.Tensor, float], Moments]
    gradient: Callable[[torch.Tensor, torch.Tensor, RowGradient, float], None]


def row_functions(backend: Backend, device: torch.device, dtype: torch.dtype) -> RowFunctions:
    """The implementation to use for logits of this device and dtype.

    Raises:
        ConfigError: unknown backend, or one that can not run here.
    """
    if backend not in BACKENDS:
        raise ConfigError.of("backend", backend, "unknown", f"use one of: {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and dtype != torch.float64 else "torch"
    # Imported on demand: triton is not installed everywhere, and torch.compile is slow to load.
    if backend == "triton":
        if dtype == torch.float64:
            raise ConfigError.of(
                "backend", backend, "keeps float32 statistics", "use torch for float64 logits"
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError.of(
                "backend",
                backend,
                f"needs a CUDA device, the logits are on {device.type}",
                "use auto, or set TRITON_INTERPRET=1 to test the kernels",
            )
        from opd_megatron.losses.fused import rows_triton as functions
    elif backend == "compiled":
        from opd_megatron.losses.fused import rows_compiled as functions
    else:
        from opd_megatron.losses.fused import rows_torch as functions
    return RowFunctions(backend, functions.moments, functions.gradient)
