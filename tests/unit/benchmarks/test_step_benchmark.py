"""The harness of benchmarks/step.py: cases, stage clocks, report. That it measures real ranks: tests/real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import step, step_clock, step_report
from benchmarks.step_cases import SHAPES, StepCase, cases, write_step_batch, write_student
from opd_megatron.config.rules import problems
from opd_megatron.exchange.batch_file import read_index
from opd_megatron.megatron.architecture import architecture_of, check_layout, read_config

ALL = [*cases("cpu"), *cases("cuda"), *cases("cpu", quick=True)]
LAYOUTS = ("1 rank", "recompute", "TP 2", "PP 2", "CP 2", "DP 2", "distributed optimizer")


@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c.device}-{c.name}")
def test_every_case_fits_its_layout_and_survives_json(case: StepCase) -> None:
    assert StepCase.from_json(case.to_json()) == case
    recipe = case.recipe(Path("student"))
    check_layout(architecture_of(SHAPES[case.shape].config()), recipe.learner)
    # It is no whole recipe (no data, no teacher, no servers); its learner keeps the rules.
    assert [problem for problem in problems(recipe) if problem.startswith("learner.")] == []
    assert case.prompt + case.response <= case.tokens_per_microbatch
    assert len(step.predict(case, 4)) == recipe.learner.pipeline_parallel


def test_every_layout_that_is_promised_is_measured() -> None:
    names = [case.name for case in cases("cpu")]
    assert len(names) == len(set(names))
    assert all(any(word in name for name in names) for word in LAYOUTS)


def test_student_and_batch_are_what_a_learner_reads(tmp_path: Path) -> None:
    case = next(cases("cpu", quick=True))
    student = write_student(tmp_path / "student", SHAPES[case.shape], seed=1)
    assert architecture_of(read_config(student)).hidden_size == SHAPES[case.shape].hidden
    write_step_batch(tmp_path / "batch.safetensors", case)
    index = read_index(tmp_path / "batch.safetensors")
    assert index.num_response_tokens == case.samples * case.response
    assert int(index.sample_offsets[-1]) == case.num_tokens


def test_nested_clocks_charge_every_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0, 9.0, 10.0])
    monkeypatch.setattr(step_clock, "clock", lambda device: next(ticks))
    clocked = step_clock.Clocked("cpu")
    inner = clocked.wrap(lambda: "answer", "inner")
    outer = clocked.wrap(lambda: inner(), "outer")
    assert clocked.wrap(lambda: outer(), "whole")() == "answer"
    assert clocked.seconds == {"inner": 4.0, "outer": 4.0, "whole": 2.0}


def result(name: str, ours: list[float], bare: list[float], measured: int) -> dict[str, Any]:
    case = next(c for c in cases("cpu") if c.name == name)
    stages = dict.fromkeys(
        ("read and pack", "forward and backward", "reduce and norm", "optimizer", "other"), 0.1
    )
    time = {
        "ours_s": ours, "bare_s": bare, "step_s": [0.5], "stages_s": stages,
        "publish_s": 0.2, "save_s": 0.004, "num_microbatches": 4,
    }  # fmt: skip
    memory = {"ranks": [{"stage": 0, "bytes": measured}], "num_microbatches": 4}
    predicted = step.predict(case, 4)
    return {
        "case": json.loads(case.to_json()),
        "time": time,
        "memory": memory,
        "predicted": predicted,
    }


def test_the_report_says_overhead_error_and_what_failed() -> None:
    good = result("small, 1 rank", [1.1, 1.02, 3.0], [1.0, 1.0, 1.0], 300 << 20)
    hidden = result("wide, chunked", [1.0], [], 100 << 20)
    failed = {"case": good["case"] | {"name": "small, TP 2"}, "error": "RuntimeError: no"}
    facts = dict.fromkeys(
        (
            "cpu",
            "cores",
            "memory_gib",
            "kernel",
            "python",
            "torch",
            "megatron-core",
            "commit",
            "date",
        ),
        "x",
    )
    record = {
        "command": "python -m benchmarks.step --device cpu",
        "environment": facts | {"load_average_at_start": 0.0},
        "results": [good, hidden, failed],
    }
    assert step_report.overhead(good) == pytest.approx(0.1)
    assert step_report.overhead(hidden) is None
    measured, predicted = step_report.largest_rank(good)
    assert measured == 300 << 20 and predicted == good["predicted"][0]["total"]
    text = step_report.render(record)
    assert "median +10.0%, largest +10.0%; within the goal of 5% in 0 of 1 cases" in text
    assert f"{predicted / measured - 1:+.1%}" in text
    assert "- small, TP 2: failed: RuntimeError: no" in text
    assert "| small, 1 rank | 2,048 |" in text
