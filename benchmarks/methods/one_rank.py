"""A world of one process, for peers that ask Megatron for their tensor-parallel group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def start(device_type: str) -> None:
    """Start torch.distributed and Megatron's groups with one rank, once per process."""
    if dist.is_initialized():
        return
    backend = "nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(0)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
