"""benchmarks/step.py on real ranks: times, stages and memory of one small case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import step, step_report
from benchmarks.step_cases import cases

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_case_is_measured_and_its_memory_is_near_the_estimate() -> None:
    case = next(c for c in cases("cpu", quick=True) if c.name == "small, TP 2, SP")
    result = step.measure_case(replace(case, samples=8, repeats=2))
    assert "error" not in result, result
    time = result["time"]
    assert len(time["ours_s"]) == len(time["bare_s"]) == 2
    assert all(seconds > 0 for seconds in (*time["ours_s"], *time["bare_s"], time["publish_s"]))
    stages = time["stages_s"]
    assert min(stages[name] for name in ("read and pack", "forward and backward", "optimizer")) > 0
    assert sum(stages.values()) == pytest.approx(time["step_s"][0], rel=0.01)
    assert len(result["memory"]["ranks"]) == 2
    measured, predicted = step_report.largest_rank(result)
    # A small model: what the process itself grew by is a larger share than in docs/benchmarks.md.
    assert 0.5 < predicted / measured < 1.5
