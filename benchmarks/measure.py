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


def give_back(device: str) -> None:
    """Hand freed memory that the allocator holds back to the kernel (CPU)."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes(device: str) -> int:
    """What this process holds now."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status_bytes("VmRSS")


def code_bytes(device: str) -> int:
    """Of these, pages of files: libraries, as far as they were used. No tensors (CPU)."""
    return 0 if device == "cuda" else _status_bytes("RssFile")


def reset_peak(device: str) -> None:
    """From here on `peak_bytes` counts."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR_REFS.write_text(_RESET_PEAK)


def peak_bytes(device: str) -> int:
    """The most that this process held since `reset_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def extra_peak_bytes(call: Callable[[], object], device: str) -> int:
    """Peak bytes of `call()` over what was allocated before; its result is alive at the end."""
    give_back(device)
    reset_peak(device)
    before = resident_bytes(device)
    result = call()
    peak = peak_bytes(device)
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
