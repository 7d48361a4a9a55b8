"""Runs the CUDA-literal code paths of Megatron-Core on CPU and gloo.

Megatron-Core writes "cuda" into factory calls, compares `Tensor.type()` with
'torch.cuda.FloatTensor', pins memory and keeps CUDA generators. One `TorchFunctionMode` rewrites
such calls wherever they are, a few functions of `torch.cuda` are replaced, and the random-number
tracker keeps CPU generators.

What is replaced on `torch.cuda`: current_device, synchronize, set_device, the three generator
functions, and (from Megatron-Core 0.17) the four functions that hand out streams, for its gradient
buffers ask for the current stream. On CPU there is one stream and everything on it has finished.

Installed only when the device is "cpu"; the mode is thread-local, so install it in the thread that
calls Megatron. Left out: events and CUDA graphs (nothing used on CPU needs them in the tested
versions).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed: list[TorchFunctionMode] = []


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaToCpu(TorchFunctionMode):
    """Rewrites device arguments and answers for CPU tensors as if they were on CUDA."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Optimizer code compares with 'torch.cuda.FloatTensor' literals.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class _FinishedStream:
    """The one stream of a CPU: every operation on it is over when the call returns."""

    def wait_stream(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def record_event(self, _: object = None) -> None: ...

    def synchronize(self) -> None: ...


def _replace_cuda_functions() -> None:
    cpu = torch.device("cpu")
    stream = _FinishedStream()
    # One function object each: torch._dynamo keeps a table of the functions of `torch.cuda`.
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": lambda: cpu,
        "synchronize": lambda *_, **__: None,
        "set_device": lambda *_, **__: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "current_stream": lambda *_, **__: stream,
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)


def _replace_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Keeps the named states as CPU generator states."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            generator = torch.Generator()
            generator.manual_seed(seed)
            self.states_[name] = generator.get_state()

        @contextlib.contextmanager
        def fork(
            self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME
        ) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    megatron_random.CudaRNGStatesTracker = CpuRngStatesTracker


def install() -> None:
    """Install once per process, before any model is built. Later calls do nothing."""
    if _installed:
        return
    _replace_cuda_functions()
    _replace_rng_tracker()
    mode = _CudaToCpu()
    mode.__enter__()
    _installed.append(mode)
