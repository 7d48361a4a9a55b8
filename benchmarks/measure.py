"""Peak memory over a baseline, and the time of forward and backward, on a CPU or a CUDA device.

CPU: the kernel keeps the highest resident size of a process (VmHWM). Writing 5 to
/proc/self/clear_refs resets it, so `VmHWM after - VmRSS before` is what one call needed on top of
all that was there, tensors of the inputs included. Freed memory that the allocator still holds
would hide in the baseline, so it is given back first (malloc_trim). No sampling, nothing missed.

CUDA: torch's own counters, max_memory_allocated after - memory_allocated before.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), clear_refs


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS}: no field {field}; peak memory on a CPU needs Linux")


def extra_peak_bytes(call: Callable[[], object], device: str) -> int:
    """Peak bytes of `call()` over what was allocated before; its result is alive at the end."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
        result = call()
        peak = _status_bytes("VmHWM")
    del result
    return peak - before


def clock(device: str) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Seconds:
    """All timed calls of one method at one K; the table shows medians."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def summary(self) -> dict[str, object]:
        total = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return {
            "median": median(total),
            "min": min(total),
            "forward_median": median(self.forward),
            "backward_median": median(self.backward),
            "all_forward": [round(s, 6) for s in self.forward],
            "all_backward": [round(s, 6) for s in self.backward],
        }


def median_seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median of `repeats` calls after one that is not counted."""
    call()
    seconds: list[float] = []
    for _ in range(repeats):
        start = clock(device)
        call()
        seconds.append(clock(device) - start)
    return median(seconds)
