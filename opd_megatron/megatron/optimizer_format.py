"""Loading optimizer state that was saved with the distributed optimizer without it, and the other way round.

Megatron loads each kind only from its own. The tensors of both lie in the checkpoint under the names of the model's
weights, so only names and the place of the step count differ (X: a weight's name):

                          distributed optimizer        plain, bf16                      plain, fp32
    moments               optimizer.state.exp_avg.X    optimizer.state.exp_avg.X        optimizer.state.exp_avg.X
    weights in fp32       optimizer.state.param.X      optimizer.state.fp32_param.X     X, the model's own
    step                  in its parameter groups      common_step, or in the groups    common_step, or in the groups

Left out: a change of precision, and experts (one optimizer, not a chain).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

_DISTRIBUTED = "optimizer.state.param."
_PLAIN = "optimizer.state.fp32_param."


def _saved_step(saved: dict[str, Any]) -> float:
    """Steps that the saved optimizer had made, from the common part of its state."""
    inner = saved.get("optimizer", saved)
    state = inner.get("state", {})
    if "common_step" in state:
        return float(state["common_step"])
    (step,) = {float(group["step"]) for group in inner["param_groups"] if "step" in group}
    return step


def _set_step(optimizer: torch.optim.Optimizer, step: float) -> None:
    """torch's AdamW counts in a tensor per parameter, fused optimizers in their groups."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = int(step)


def _read(wanted: Any, directory: Path, old: str, new: str) -> Any:
    """Load tensors whose names begin with `old` from where the other kind wrote them."""
    for leaf in nested_values(wanted):
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory) and leaf.key.startswith(old):
            leaf.key = new + leaf.key.removeprefix(old)
    loaded: Any = dist_checkpointing.load({"other_kind": wanted}, str(directory))
    return loaded["other_kind"]


def _into_distributed(
    part: DistributedOptimizer, model: dict[str, Any], metadata: dict[str, Any], directory: Path
) -> None:
    wanted: Any = part.sharded_state_dict(model, is_loading=True, metadata=metadata)
    new = _PLAIN if part.config.bf16 else ""
    part.load_parameter_state_from_fully_reshardable(
        _read(wanted["param_state"], directory, _DISTRIBUTED, new)
    )


@torch.no_grad()
def _into_plain(
    part: Any, model: dict[str, Any], metadata: dict[str, Any], directory: Path
) -> None:
    wanted = part.sharded_state_dict(model, is_loading=True, metadata=metadata)
    inner = wanted["optimizer"] if part.config.bf16 else wanted
    moments = {number: state for number, state in inner["state"].items() if number != "common_step"}
    masters = wanted.get("fp32_from_fp16_params", [])
    loaded = _read({"moments": moments, "masters": masters}, directory, _PLAIN, _DISTRIBUTED)
    parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
    for number, state in loaded["moments"].items():
        for name, tensor in state.items():
            part.optimizer.state[parameters[number]][name].copy_(tensor)
    groups = part.fp32_from_float16_groups if part.config.bf16 else []
    for group, tensors in zip(groups, loaded.get("masters", []), strict=True):
        for master, tensor in zip(group, tensors, strict=True):
            master.copy_(tensor)


def load_other_kind(
    optimizer: ChainedOptimizer,
    saved: dict[str, Any],
    model: dict[str, Any],
    metadata: dict[str, Any],
    directory: Path,
) -> None:
    """Fill a fresh optimizer from a checkpoint of the other kind. Collective.

    Args:
        optimizer: of loaded weights.
        saved: the checkpoint's common optimizer state.
        model: the model's sharded state.
        metadata: the checkpoint's format.
        directory: the checkpoint.
    """
    (part,) = optimizer.chained_optimizers
    if isinstance(part, DistributedOptimizer):
        _into_distributed(part, model, metadata, directory)
    else:
        _into_plain(part, model, metadata, directory)
    assert part.optimizer is not None
    _set_step(part.optimizer, _saved_step(saved))
