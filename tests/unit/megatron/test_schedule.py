"""The learning-rate curve: its values by hand, its ends, what a checkpoint keeps of it, and the rules of its keys."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from opd_megatron.config.rules import problems
from opd_megatron.config.schema import OptimizerConfig, Recipe
from opd_megatron.errors import CheckpointError
from opd_megatron.megatron.schedule import Curve, LearningRateSchedule, curve_of


class Groups:
    """An optimizer's groups, one with Megatron's multipliers."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}, {"lr_mult": 0.5, "wd_mult": 0.0}]


def rates(curve: Curve, steps: int) -> list[float]:
    return [curve.at(step) for step in range(steps)]


def test_constant_is_the_peak_at_every_step() -> None:
    assert rates(curve_of(OptimizerConfig(lr=0.25), 4), 6) == [0.25] * 6


def test_warm_up_is_a_straight_line_that_never_has_a_step_of_rate_zero() -> None:
    curve = curve_of(OptimizerConfig(lr=1.0, warmup_steps=4), 10)
    assert rates(curve, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_by_hand() -> None:
    config = OptimizerConfig(lr=1.0, schedule="linear", warmup_steps=2, min_lr=0.2)
    assert rates(curve_of(config, 6), 8) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_by_hand() -> None:
    config = OptimizerConfig(lr=1.0, schedule="cosine", min_lr=0.1)
    half = math.sqrt(0.5)
    expected = [1 + half, 1.0, 1 - half]
    found = rates(curve_of(config, 4), 6)
    assert found == pytest.approx([1.0, *(0.1 + 0.45 * x for x in expected), 0.1, 0.1])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_a_decay_starts_at_the_peak_falls_and_ends_at_the_floor(shape: str, warmup: int) -> None:
    config = OptimizerConfig(lr=3e-4, schedule=shape, warmup_steps=warmup, min_lr=1e-5)
    curve = curve_of(config, 40)
    found = rates(curve, 60)
    assert found[warmup] == curve.peak == max(found)
    assert all(a > b for a, b in zip(found[warmup:40], found[warmup + 1 : 41], strict=True))
    assert found[40:] == pytest.approx([1e-5] * 20)
    assert min(found[:40]) > 0


def test_an_own_end_does_not_follow_the_length_of_the_run() -> None:
    config = OptimizerConfig(lr=1.0, schedule="linear", decay_steps=10)
    assert curve_of(config, 50) == curve_of(config, 99)
    assert curve_of(dataclasses.replace(config, decay_steps=0), 10) == curve_of(config, 50)


def test_groups_hold_the_rate_of_the_next_step_with_their_multipliers() -> None:
    groups = Groups()
    schedule = LearningRateSchedule(groups, Curve("constant", 1.0, 1.0, 4, 0), weight_decay=0.1)
    assert [g["lr"] for g in groups.param_groups] == [0.25, 0.125]
    assert [g["weight_decay"] for g in groups.param_groups] == [0.1, 0.0]
    schedule.step(2)
    assert [g["lr"] for g in groups.param_groups] == [0.75, 0.375]


@pytest.mark.parametrize("split", range(12))
def test_going_on_from_a_saved_state_gives_the_same_rates_exactly(split: int) -> None:
    curve = Curve("cosine", 1e-3, 1e-5, 3, 11)
    straight = rates(curve, 12)
    first = LearningRateSchedule(Groups(), curve, 0.0)
    first.step(split)
    saved = json.loads(json.dumps(first.state_dict()))
    groups = Groups()
    second = LearningRateSchedule(groups, curve, 0.0)
    second.load_state_dict(saved)
    for rate in straight[split:]:
        assert groups.param_groups[0]["lr"] == rate
        second.step(1)


def test_another_curve_is_refused_constant_by_constant() -> None:
    saved = LearningRateSchedule(Groups(), Curve("linear", 1e-3, 0.0, 3, 40), 0.0).state_dict()
    longer = LearningRateSchedule(Groups(), Curve("linear", 1e-3, 0.0, 5, 60), 0.0)
    with pytest.raises(CheckpointError) as raised:
        longer.load_state_dict(saved)
    text = str(raised.value)
    assert "warmup_steps: 3 -> 5" in text and "decay_steps: 40 -> 60" in text
    assert "peak" not in text and "optimizer.decay_steps" in text


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"min_lr": 1e-6}, "optimizer.min_lr=1e-06: a constant schedule does not use it"),
        ({"decay_steps": 5}, "optimizer.decay_steps=5: a constant schedule does not use it"),
        ({"schedule": "cosine", "warmup_steps": 100}, "the cosine decay ends at step 100"),
        ({"schedule": "linear", "warmup_steps": 7, "decay_steps": 7}, "decay ends at step 7"),
        ({"schedule": "linear", "min_lr": 1e-2}, "must be at most optimizer.lr=0.001"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], complaint: str
) -> None:
    recipe = Recipe(steps=100, optimizer=OptimizerConfig(**{"lr": 1e-3, **settings}))
    assert any(complaint in line for line in problems(recipe))


def test_sensible_settings_are_accepted() -> None:
    config = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=10, min_lr=1e-5)
    assert not [p for p in problems(Recipe(steps=100, optimizer=config)) if "optimizer" in p]
