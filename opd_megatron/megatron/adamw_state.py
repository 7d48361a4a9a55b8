"""What torch's AdamW needs so that Megatron-Core 0.16 saves and loads its state correctly.

Without Transformer Engine or Apex, Megatron falls back to `torch.optim.AdamW`, which counts steps
in one tensor per parameter. Three things then go wrong around `DistributedOptimizer`:

1. a fresh AdamW has no state, but `state_dict` reads one common `step`;
2. loading copies every state tensor by name, and the checkpoint holds no per-parameter `step`;
3. loading gives all parameters the SAME step tensor, which AdamW then advances once per parameter:
   a silently wrong bias correction.

`prime` fixes the first two, `separate_steps` the third. Both do nothing for other optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """Megatron optimizers around a torch AdamW."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part


def _accept_missing_step(part: DistributedOptimizer) -> None:
    stock = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        stock(model_param, {"step": state["step"], **tensors})

    part._set_main_param_and_optimizer_states = set_states  # type: ignore[method-assign]


def prime(optimizer: MegatronOptimizer) -> None:
    """Give a new AdamW the state it would create at its first step."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter].update(
                    step=torch.tensor(0.0, dtype=torch.float32),
                    exp_avg=torch.zeros_like(parameter.data),
                    exp_avg_sq=torch.zeros_like(parameter.data),
                )
        if isinstance(part, DistributedOptimizer):
            _accept_missing_step(part)


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """After a load: one step tensor per parameter."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()
