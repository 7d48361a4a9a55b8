"""The parts of a step add up to the step, however its stages overlap, also with those of the next one."""

from __future__ import annotations

import pytest

from opd_megatron.controller.stopwatch import LEARNER_FIRST, STAGES, Stopwatch, union_length


def test_union_counts_overlap_once() -> None:
    assert union_length([(0, 2), (1, 3), (5, 6)]) == 4
    assert union_length([]) == 0


def begun(order: tuple[str, ...]) -> tuple[Stopwatch, float]:
    """A stopwatch whose step began ten seconds ago, and when that was."""
    watch = Stopwatch(order)
    watch.begin()
    assert watch.start is not None
    watch.start -= 10
    return watch, watch.start


@pytest.mark.parametrize(("order", "teacher", "learner"), [(STAGES, 1, 1), (LEARNER_FIRST, 1, 2)])
def test_parts_add_up_and_overlap_is_charged_to_the_first_stage(
    order: tuple[str, ...], teacher: float, learner: float
) -> None:
    watch, begin = begun(order)
    watch.add("rollout", begin, begin + 2)
    watch.add("teacher", begin + 1, begin + 3)
    watch.add("learner", begin + 2, begin + 4)
    metrics, busy = watch.end()
    assert metrics["perf/rollout_s"] == pytest.approx(2 if order is STAGES else 1)
    assert metrics["perf/teacher_s"] == pytest.approx(teacher)
    assert metrics["perf/learner_s"] == pytest.approx(learner)
    parts = [v for k, v in metrics.items() if k.endswith("_s") and k != "perf/step_s"]
    assert sum(parts) == pytest.approx(metrics["perf/step_s"])
    assert metrics["perf/outside_model_frac"] == pytest.approx(1 - 4 / metrics["perf/step_s"])
    assert busy["rollout"] == busy["teacher"] == busy["learner"] == pytest.approx(2)


def test_what_is_under_way_at_the_end_of_a_step_counts_in_both() -> None:
    watch, begin = begun(LEARNER_FIRST)
    with watch.stage("rollout"):
        watch.add("learner", begin, begin + 4)
        first, busy = watch.end()
        assert first["perf/rollout_s"] == pytest.approx(busy["rollout"]) == pytest.approx(0, abs=1)
        watch.begin()
        assert watch.start is not None
        watch.start -= 5
    second, busy = watch.end()
    assert busy["rollout"] == pytest.approx(second["perf/rollout_s"])
    assert watch.durations("rollout") and not watch.durations("learner")
