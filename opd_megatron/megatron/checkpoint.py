"""Model, optimizer, schedule and random states through `megatron.core.dist_checkpointing`.

`save` fills an empty directory and makes every file durable; the caller adds its own state and the
rename that makes it a commit. Checkpoints do not depend on the layout; random states are restored
in the same layout only (nothing in the model draws numbers while dropout is 0).

Megatron's synchronous save starts a spawned manager process and one forked writer per file, about
four seconds whatever the size. `_InProcessStrategy` runs the same writer function in this process,
one file per rank.
"""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker

from opd_megatron.atomic import fsync_dir, fsync_file
from opd_megatron.errors import CheckpointError
from opd_megatron.megatron import adamw_state
from opd_megatron.megatron.state import LearnerState


def _metadata() -> dict[str, Any]:
    """The optimizer format that other layouts can load; new each time, Megatron adds groups."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _write_buckets(transforms: list[Any], buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Megatron's writer for each file, in this process; collects what its parent would."""
    collected: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        answers: Any = queue.Queue()
        unfinished: Any = queue.Queue()
        unfinished.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, unfinished, use_fsync=True
        )
        _, answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        collected[number] = answer
    results.put(collected)


class _InProcessStrategy(TorchDistSaveShardedStrategy):
    """The stock format, written without helper processes."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, **how: Any) -> AsyncRequest:
        # The writer takes its results queue from here; a plain one serves a writer in this process.
        filesystem_async._results_queue = queue.Queue()
        try:
            return super().async_save(sharded_state_dict, checkpoint_dir, **how)
        finally:
            filesystem_async._results_queue = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *details: Any) -> Any:
        stock = super()._get_save_and_finalize_callbacks(writer, *details)
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []

        def write(_: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
            _write_buckets(transforms, buckets, results)

        return stock._replace(async_fn=write if stock.async_fn is not None else None)


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": _tracker().get_states(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    _tracker().set_states(states["tracker"])


def _sharded_state(
    state: LearnerState, is_loading: bool, with_random_states: bool
) -> dict[str, Any]:
    optimizer, scheduler = state.require_loaded(), state.scheduler
    assert scheduler is not None
    metadata = _metadata()
    # The chunk's place in this dictionary is local; tensors are named by their layer in the model.
    model = {
        f"chunk{number}": module.sharded_state_dict(metadata=metadata)
        for number, module in enumerate(state.modules)
    }
    sharded: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
        "optimizer_step": state.optimizer_step,
        "layout": state.layout.as_mapping(),
    }
    if with_random_states:
        sharded["random_states"] = ShardedObject(
            "random_states", _random_states(), (dist.get_world_size(),), (dist.get_rank(),)
        )
    return sharded


def save(state: LearnerState, directory: Path) -> int:
    """Write a checkpoint into an existing empty directory; durable when it returns. Collective.

    Returns:
        Number of files.

    Raises:
        CheckpointError: the directory is missing or not empty.
    """
    if not directory.is_dir() or next(directory.iterdir(), None) is not None:
        raise CheckpointError(f"{directory}: save needs an existing empty directory")
    dist.barrier()  # every rank has looked before any rank writes
    dist_checkpointing.save(
        _sharded_state(state, is_loading=False, with_random_states=True),
        str(directory),
        sharded_strategy=_InProcessStrategy(),
        content_metadata=_metadata(),
    )
    files = [path for path in directory.iterdir() if path.is_file()]
    if dist.get_rank() == 0:
        for path in files:
            fsync_file(path)
        fsync_dir(directory)
    dist.barrier()
    return len(files)


def load(state: LearnerState, directory: Path) -> None:
    """Replace weights, optimizer, schedule and step counter by a checkpoint's. Collective.

    Raises:
        CheckpointError: not a checkpoint, damaged, or of another model or optimizer.
    """
    if not (directory / "metadata.json").is_file():
        raise CheckpointError(f"{directory}: not a checkpoint (no metadata.json)")
    state.fresh_optimizer()
    assert state.optimizer is not None and state.scheduler is not None
    try:
        common = dist_checkpointing.load_common_state_dict(str(directory))
        same_layout = common["layout"] == state.layout.as_mapping()
        loaded: Any = dist_checkpointing.load(
            _sharded_state(state, is_loading=True, with_random_states=same_layout), str(directory)
        )
        for number, module in enumerate(state.modules):
            module.load_state_dict(loaded["model"][f"chunk{number}"])
        state.optimizer.load_state_dict(loaded["optimizer"])
    except Exception as error:  # whatever damaged files raise inside torch or Megatron
        raise CheckpointError(f"{directory}: can not be loaded: {error!r}") from error
    adamw_state.separate_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.optimizer_step = loaded["optimizer_step"]
    if same_layout:
        _restore_random_states(loaded["random_states"])
