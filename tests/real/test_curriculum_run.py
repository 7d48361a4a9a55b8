"""Several teachers in whole runs: a soft switch, the recipe to its end, lists of a served teacher, control texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from whole_runs import SMALL, check_finished, check_nothing_runs, rows, start

from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

NAMES = ("early", "late", "main", "middle")


def run_recipe(name: str, tmp_path: Path, *settings: str) -> tuple[RunDir, str]:
    run, output = RunDir(tmp_path / "run"), tmp_path / "output.txt"
    process = start("run", name, "--run-dir", str(run.root), *settings, output=output)
    assert process.wait(timeout=280) == 0, output.read_text()
    check_nothing_runs(run)
    return run, output.read_text()


def test_a_soft_switch_hands_over_from_one_teacher_to_the_next(tmp_path: Path) -> None:
    run, text = run_recipe(
        "demo_curriculum",
        tmp_path,
        *("teaching.kind=soft_switch", "teachers.main.engine=in_process", "steps=4", *SMALL),
        *("objective.estimator=support_matching", "objective.support=full", "evaluation.every=0"),
    )
    check_finished(run, 4)
    assert "teaching soft_switch over 4 steps: early from step 0, middle from step 0.8" in text
    steps = rows(run.metrics)
    shares = [
        {name: step[f"teacher/share/{name}"] for name in NAMES if step[f"teacher/share/{name}"]}
        for step in steps[1:]
    ]
    assert shares[0] == {"early": 1.0}
    assert shares[1] == pytest.approx({"middle": 0.75, "late": 0.25})
    assert shares[2] == pytest.approx({"late": 0.5, "main": 0.5})
    assert shares[3] == {"main": 1.0}
    for step in steps[1:]:
        # Both are of the mean: the exact divergence, and what the sampled tokens estimate of it.
        assert step["train/support_divergence"] == pytest.approx(step["train/kl_reverse"], abs=0.5)
    kls = {name: steps[0][f"eval/heldout/kl_reverse_to/{name}"] for name in NAMES}
    assert kls["main"] == steps[0]["eval/heldout/kl_reverse"]
    assert kls["early"] < kls["main"], "the first teacher is the student's neighbour"
    assert "eval/heldout/kl_reverse_to/early" in (run.root / "report.html").read_text()


@pytest.mark.slow
def test_the_whole_curriculum_brings_the_student_to_its_last_teacher(tmp_path: Path) -> None:
    run, _ = run_recipe("demo_curriculum", tmp_path)
    summary = json.loads(run.summary.read_text())
    assert summary["ledger"]["trained"] == summary["ledger"]["issued"] == 60 * 64
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.25
    steps = rows(run.metrics)
    teachers = [max(NAMES, key=lambda name: step[f"teacher/share/{name}"]) for step in steps[1:]]
    assert teachers == ["early"] * 12 + ["middle"] * 12 + ["late"] * 12 + ["main"] * 24


@pytest.mark.slow
@pytest.mark.parametrize("support", ["student_topk", "union", "symmetric_difference"])
def test_a_served_teacher_is_followed_on_tokens_that_the_student_chose(
    tmp_path: Path, support: str
) -> None:
    run, text = run_recipe(
        "demo",
        tmp_path,
        *("objective.estimator=support_matching", f"objective.support={support}"),
        *("objective.topk=4", "objective.support_route=listed", "steps=4", *SMALL),
        *("batch.rollouts_per_prompt=16", "evaluation.every=0"),
        *("evaluation.problems=16", "evaluation.kl_problems=16"),
    )
    check_finished(run, 4)
    assert "served teachers are asked for top-4, then listed tokens" in text
    steps = rows(run.metrics)
    assert all(step["teacher/left_out_mass"] == 0.0 for step in steps[1:])
    assert steps[-1]["eval/heldout/kl_reverse"] < steps[0]["eval/heldout/kl_reverse"]


@pytest.mark.slow
def test_a_student_that_is_told_its_teacher_answers_as_each(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "demo" / "teacher"
    run, _ = run_recipe(
        "demo",
        tmp_path,
        *(f"teachers.weak.path={path.with_name('student')}", "teaching.kind=control_token"),
        "teachers.weak.may_equal_student=true",
        *("teachers.weak.server.max_total_tokens=16384", "teachers.weak.server.context_length=64"),
        *("teaching.control_texts.main='1:'", "teaching.control_texts.weak='2:'"),
        *("data.max_prompt_tokens=16", "steps=4", *SMALL, "evaluation.every=0"),
    )
    check_finished(run, 4)
    last = rows(run.metrics)[-1]
    for name in ("main", "weak"):
        assert 0.0 <= last[f"eval/heldout/accuracy_as/{name}"] <= 1.0
        assert last[f"eval/heldout/kl_reverse_to/{name}"] >= 0.0
        assert last[f"teacher/share/{name}"] >= 0.0
