"""Alarms on rollouts that never stop or repeat themselves."""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.config.schema import AlarmConfig
from opd_megatron.controller.alarms import Alarms, RolloutAlarm, is_repetitive
from opd_megatron.controller.records import length_metrics
from opd_megatron.errors import EXIT_CONFIG
from opd_megatron.types import Rollout, Sample, TeacherScores


def feed(config: AlarmConfig, truncated: list[float], repetitive: float = 0.0) -> list[str]:
    said: list[str] = []
    alarms = Alarms(config, said.append)
    for step, value in enumerate(truncated, start=1):
        alarms.check(step, {"rollout/truncated_frac": value, "rollout/repetitive_frac": repetitive})
    return said


def test_a_warning_comes_with_the_full_window_and_once_per_rise() -> None:
    config = AlarmConfig(window=3, max_truncated_frac=0.5)
    assert feed(config, [1.0, 1.0]) == []
    said = feed(config, [1.0] * 6)
    assert len(said) == 1
    assert "truncation alarm at step 3: 100% of the responses of the last 3 steps" in said[0]
    assert "alarms.max_truncated_frac=0.5" in said[0] and "aliases" in said[0]
    assert len(feed(config, [1.0] * 3 + [0.0] * 3 + [1.0] * 3)) == 2
    assert feed(config, [0.5] * 9) == []


def test_stop_ends_the_run_with_the_way_to_go_on() -> None:
    config = AlarmConfig(window=2, truncation="stop")
    with pytest.raises(RolloutAlarm, match=r"--resume alarms\.truncation=warn") as caught:
        feed(config, [0.9, 0.9])
    assert caught.value.exit_code == EXIT_CONFIG
    with pytest.raises(RolloutAlarm, match="repetition alarm at step 1: 40%"):
        feed(AlarmConfig(window=1, repetition="stop"), [0.0], repetitive=0.4)


def test_none_is_silent() -> None:
    config = AlarmConfig(window=1, truncation="none", repetition="none")
    assert feed(config, [1.0], repetitive=1.0) == []


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((), False),
        ((7,) * 7, False),
        ((7,) * 8, True),
        ((1, 2, 3) + (7,) * 8, True),
        ((7,) * 8 + (1,), False),
        ((4,) + (5, 6) * 8, True),
        ((4,) + (5, 6) * 7, False),
        (tuple(range(32)) * 8, True),
        (tuple(range(33)) * 8, False),
        (tuple(range(200)), False),
    ],
)
def test_a_loop_is_one_block_eight_times_at_the_end(ids: tuple[int, ...], expected: bool) -> None:
    assert is_repetitive(ids) is expected


def test_a_slow_reading_of_the_definition_agrees_on_random_responses() -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(300):
        ids = tuple(rng.integers(0, 2, 5).tolist()) + tuple(
            rng.integers(0, 3, rng.integers(1, 5)).tolist()
        ) * int(rng.integers(1, 12))
        slow = any(len(ids) >= 8 * p and ids[-8 * p :] == ids[-p:] * 8 for p in range(1, 33))
        assert is_repetitive(ids) is slow
        seen.add(slow)
    assert seen == {True, False}


def test_both_shares_are_metrics_of_every_step() -> None:
    def sample(ids: tuple[int, ...], reason: str) -> Sample:
        zeros = np.zeros(len(ids), np.float32)
        rollout = Rollout("a#0", "a", (1,), ids, zeros, reason, 0, 0, "rollout-0")
        return Sample(rollout, TeacherScores("main", zeros))

    metrics = length_metrics([sample((7,) * 9, "length"), sample((1, 2), "stop")])
    assert metrics["rollout/truncated_frac"] == metrics["rollout/repetitive_frac"] == 0.5
