"""The parts of a step add up to the step, however its stages overlap."""

from __future__ import annotations

import pytest

from opd_megatron.controller.stopwatch import Stopwatch, union_length


def test_union_counts_overlap_once() -> None:
    assert union_length([(0, 2), (1, 3), (5, 6)]) == 4
    assert union_length([]) == 0


def test_parts_add_up_and_overlap_is_charged_to_the_first_stage() -> None:
    watch = Stopwatch()
    begin = watch.start
    watch.add("rollout", begin, begin + 2)
    watch.add("teacher", begin + 1, begin + 3)
    watch.add("learner", begin + 3, begin + 4)
    watch.start -= 6  # the step has lasted at least six seconds
    metrics = watch.metrics()
    assert metrics["perf/rollout_s"] == pytest.approx(2)
    assert metrics["perf/teacher_s"] == pytest.approx(1)
    assert metrics["perf/learner_s"] == pytest.approx(1)
    parts = [v for k, v in metrics.items() if k.endswith("_s") and k != "perf/step_s"]
    assert sum(parts) == pytest.approx(metrics["perf/step_s"])
    assert metrics["perf/outside_model_frac"] == pytest.approx(1 - 4 / metrics["perf/step_s"])
