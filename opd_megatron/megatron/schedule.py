"""The learning rate of every optimizer step.

Step t counts from 0; `peak` is `optimizer.lr`, w `warmup_steps`, d `decay_steps` (0: the run's `steps`), `low`
`min_lr`.

    t < w        peak (t + 1) / w              the last warm-up step is at the peak, and no step has rate 0
    then         x = min(1, (t - w) / (d - w))
    constant     peak
    linear       low + (peak - low) (1 - x)
    cosine       low + (peak - low) (1 + cos(pi x)) / 2

Ours rather than Megatron's OptimizerParamScheduler, whose warm-up starts with a step of rate 0 and whose load is an
assertion on `steps`, so that no run could be made longer. Only steps that were applied count. Left out: schedules of
the weight decay, and rates that differ between parameters (Megatron's `lr_mult` and `wd_mult` are kept).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from opd_megatron.config.schema import OptimizerConfig
from opd_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Curve:
    """The formula's constants."""

    shape: str
    peak: float
    low: float
    warmup_steps: int
    decay_steps: int

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        x = min(1.0, (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
        height = 1.0 - x if self.shape == "linear" else (1.0 + math.cos(math.pi * x)) / 2
        return self.low + (self.peak - self.low) * height


def curve_of(config: OptimizerConfig, steps: int) -> Curve:
    """The curve of a recipe; a constant rate has neither an end nor a floor."""
    if config.schedule == "constant":
        return Curve("constant", config.lr, config.lr, config.warmup_steps, 0)
    end = config.decay_steps or steps
    return Curve(config.schedule, config.lr, config.min_lr, config.warmup_steps, end)


class HasParamGroups(Protocol):
    """An optimizer. Its groups are asked for at every step: loading a state replaces them."""

    @property
    def param_groups(self) -> Iterable[dict[str, Any]]: ...


class LearningRateSchedule:
    """Writes the rate of the next step into the optimizer's parameter groups.

    Args:
        optimizer: whose groups are written.
        curve: the rates.
        weight_decay: of every group, times its `wd_mult`.
    """

    def __init__(self, optimizer: HasParamGroups, curve: Curve, weight_decay: float) -> None:
        self._optimizer = optimizer
        self.curve = curve
        self.weight_decay = weight_decay
        self.num_steps = 0
        self.step(0)

    def step(self, increment: int) -> None:
        """Count applied steps; the groups then hold the rate of the next one."""
        self.num_steps += increment
        rate = self.curve.at(self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": asdict(self.curve), "num_steps": self.num_steps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            CheckpointError: it was saved from another curve; every constant that differs is named.
        """
        mine = asdict(self.curve)
        differences = [
            f"{key}: {saved['curve'].get(key)!r} -> {value!r}"
            for key, value in mine.items()
            if saved["curve"].get(key) != value
        ]
        if differences:
            raise CheckpointError(
                f"the checkpoint's learning-rate schedule is another one ({', '.join(differences)}); "
                f"undo the change, or, when only `steps` was changed, set optimizer.decay_steps to the old number"
            )
        self.num_steps = saved["num_steps"]
        self.step(0)
