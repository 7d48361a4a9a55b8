"""Model, optimizer, schedule and random states through `megatron.core.dist_checkpointing`.

`save` fills an empty directory and makes every file durable; the caller adds its own state and the
rename that makes it a commit. Checkpoints do not depend on the layout; random states are restored
in the same layout only (nothing in the model draws numbers while dropout is 0).

`save` returns when it is done. `begin` returns when what is to be written was copied to host memory:
training may go on, and `finish` completes the checkpoint once every rank has written its file
(`checkpoint_writer`). One save at a time; until it is complete there is no metadata.json.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker

from opd_megatron.atomic import fsync_dir, fsync_file
from opd_megatron.errors import CheckpointError, ContractError
from opd_megatron.megatron import adamw_state
from opd_megatron.megatron.checkpoint_errors import told_apart
from opd_megatron.megatron.checkpoint_writer import InProcessStrategy, PlannedSave
from opd_megatron.megatron.optimizer_format import load_other_kind
from opd_megatron.megatron.state import LearnerState


def _metadata() -> dict[str, Any]:
    """The optimizer format that other layouts can load; new each time, Megatron adds groups."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),  # on a CPU the one above
        "tracker": _tracker().get_states(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["torch"])
    _tracker().set_states(states["tracker"])


def _model_state(state: LearnerState) -> dict[str, Any]:
    """The chunk's place in this dictionary is local; tensors are named by their layer in the model."""
    return {
        f"chunk{number}": module.sharded_state_dict(metadata=_metadata())
        for number, module in enumerate(state.modules)
    }


def _sharded_state(
    state: LearnerState, is_loading: bool, with_optimizer: bool, with_random_states: bool
) -> dict[str, Any]:
    optimizer, scheduler = state.optimizer, state.scheduler
    assert optimizer is not None and scheduler is not None
    model = _model_state(state)
    sharded: dict[str, Any] = {
        "model": model,
        "scheduler": scheduler.state_dict(),
        "optimizer_step": state.optimizer_step,
        "layout": state.layout.as_mapping(),
        "distributed_optimizer": state.recipe.learner.distributed_optimizer,
    }
    if with_optimizer:
        sharded["optimizer"] = optimizer.sharded_state_dict(model, is_loading, metadata=_metadata())
    if with_random_states:
        sharded["random_states"] = ShardedObject(
            "random_states", _random_states(), (dist.get_world_size(),), (dist.get_rank(),)
        )
    return sharded


def _refuse_while_saving(state: LearnerState) -> None:
    if state.saving is not None:
        raise ContractError(f"the save into {state.saving.directory} is not finished yet")


def _plan(state: LearnerState, directory: Path) -> PlannedSave:
    """Who writes what; rank 0 has written the common part when it returns. Collective."""
    state.require_loaded()
    _refuse_while_saving(state)
    if not directory.is_dir() or next(directory.iterdir(), None) is not None:
        raise CheckpointError(f"{directory}: save needs an existing empty directory")
    dist.barrier()  # every rank has looked before any rank writes
    with told_apart(directory, "can not be planned"):
        request = dist_checkpointing.save(
            _sharded_state(state, is_loading=False, with_optimizer=True, with_random_states=True),
            str(directory),
            sharded_strategy=InProcessStrategy(),
            async_sharded_save=True,
            content_metadata=_metadata(),
        )
    assert request is not None
    return PlannedSave(request, directory)


def _make_durable(directory: Path) -> int:
    """fsync what was written besides the ranks' files, and all names; the number of files."""
    files = [path for path in directory.iterdir() if path.is_file()]
    if dist.get_rank() == 0:
        for path in files:
            fsync_file(path)
        fsync_dir(directory)
    dist.barrier()
    return len(files)


def save(state: LearnerState, directory: Path) -> int:
    """Write a checkpoint into an existing empty directory; durable when it returns. Collective.

    Returns:
        Number of files.

    Raises:
        CheckpointError: the directory is missing or not empty, or a rank could not write.
        ContractError: another save is not finished.
        StorageError: a rank has no room.
    """
    planned = _plan(state, directory)
    planned.write()
    planned.finish(wait=True)
    return _make_durable(directory)


def begin(state: LearnerState, directory: Path) -> None:
    """Copy the state to host memory and write it in the background; `finish` completes it. Collective.

    Raises:
        CheckpointError: the directory is missing or not empty.
        ContractError: another save is not finished.
    """
    planned = _plan(state, directory)
    planned.start()
    state.saving = planned


def finish(state: LearnerState, wait: bool = False) -> int | None:
    """Complete the save that `begin` began; durable when it returns a number. Collective.

    Args:
        wait: for ranks that still write.

    Returns:
        Number of files, or None while some rank still writes.

    Raises:
        ContractError: no save was begun.
        CheckpointError, StorageError: as `save`.
    """
    planned = state.saving
    if planned is None:
        raise ContractError("there is no save to finish")
    if not planned.finish(wait):
        return None
    state.saving = None
    return _make_durable(planned.directory)


def load_weights(state: LearnerState, directory: Path) -> None:
    """Replace the weights alone by a checkpoint's, to publish them: no optimizer is built. Collective.

    Raises:
        CheckpointError: not a checkpoint, damaged, or of another model.
        StorageError: its disk fails.
        ContractError: a save is not finished.
    """
    _refuse_while_saving(state)
    _refuse_other_folder(directory)
    state.optimizer = state.scheduler = None
    with told_apart(directory, "can not be loaded"):
        _take_weights(
            state, dist_checkpointing.load({"model": _model_state(state)}, str(directory))
        )


def _refuse_other_folder(directory: Path) -> None:
    if not (directory / "metadata.json").is_file():
        raise CheckpointError(f"{directory}: not a checkpoint (no metadata.json)")


def _take_weights(state: LearnerState, loaded: Any) -> None:
    for number, module in enumerate(state.modules):
        module.load_state_dict(loaded["model"][f"chunk{number}"])
    state.has_weights = True


def load(state: LearnerState, directory: Path) -> None:
    """Replace weights, optimizer, schedule and step counter by a checkpoint's. Collective.

    Raises:
        CheckpointError: not a checkpoint, damaged, or of another model or optimizer.
        StorageError: its disk fails.
        ContractError: a save is not finished.
    """
    _refuse_while_saving(state)
    _refuse_other_folder(directory)
    state.fresh_optimizer()
    assert state.optimizer is not None and state.scheduler is not None
    with told_apart(directory, "can not be loaded"):
        common = dist_checkpointing.load_common_state_dict(str(directory))
        same_layout = common["layout"] == state.layout.as_mapping()
        same_kind = common["distributed_optimizer"] == state.recipe.learner.distributed_optimizer
        wanted = _sharded_state(
            state,
            is_loading=True,
            with_optimizer=same_kind,
            with_random_states=same_layout,
        )
        loaded: Any = dist_checkpointing.load(wanted, str(directory))
        _take_weights(state, loaded)
        if same_kind:
            state.optimizer.load_state_dict(loaded["optimizer"])
        else:
            load_other_kind(
                state.optimizer, common["optimizer"], _model_state(state), _metadata(), directory
            )
    adamw_state.separate_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.optimizer_step = loaded["optimizer_step"]
    if same_layout:
        _restore_random_states(loaded["random_states"])
