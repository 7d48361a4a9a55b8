"""`opd probe` on real servers: the better teacher first, the student itself at distance zero, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from whole_runs import check_nothing_runs, start

from opd_megatron.config.recipes import load_recipe
from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


def test_teachers_are_measured_ranked_and_ended(tmp_path: Path) -> None:
    run, output = RunDir(tmp_path / "run"), tmp_path / "output.txt"
    student = load_recipe("demo")[0].student.path
    settings = [
        *("preflight.probe_prompts=8", "preflight.probe_rollouts=2", "preflight.probe_topk=4"),
        *("evaluation.samples_per_problem=4", f"teachers.itself.path={student}"),
        "teachers.itself.may_equal_student=true",
        *("teachers.itself.server.max_total_tokens=4096", "teachers.itself.server.dtype=float32"),
        *("teachers.itself.server.context_length=64", "rollout.top_p=0.95", "rollout.top_k=32"),
    ]
    process = start("probe", "demo", "--run-dir", str(run.root), *settings, output=output)
    assert process.wait(timeout=240) == 0, output.read_text()
    check_nothing_runs(run)
    record = json.loads((run.root / "probe.json").read_text())
    rows = {row["name"]: row for row in record["teachers"]}
    assert [row["name"] for row in record["teachers"]] == ["main", "itself"]
    itself, main = rows["itself"], rows["main"]
    assert itself["exact"] and abs(itself["reverse_kl"]) < 1e-5 and abs(itself["forward_kl"]) < 1e-5
    # Two servers, which form other batches: equal up to the rounding of a sum.
    assert itself["overlap"] == 1.0 and abs(itself["student_mass"] - itself["teacher_mass"]) < 1e-5
    assert main["reverse_kl"] > 0.01 and main["forward_kl"] > 0.01
    assert 0 < main["overlap"] < 1 and 0 < main["student_mass"] <= 1
    assert main["accuracy"] > record["student"]["accuracy"] + 0.1
    assert main["end_agreement"] > 0.5 and main["seconds"] > 0
    assert main["num_tokens"] == itself["num_tokens"] > 100
    table = output.read_text()
    assert "KL(s||t)" in table and table.index(" main ") < table.index(" itself ")


@pytest.mark.slow
def test_a_teacher_inside_the_learner_is_compared_exactly(tmp_path: Path) -> None:
    run, output = RunDir(tmp_path / "run"), tmp_path / "output.txt"
    settings = [
        *("preflight.probe_prompts=4", "teachers.main.engine=in_process"),
        "evaluation.samples_per_problem=2",
    ]
    process = start("probe", "demo", "--run-dir", str(run.root), *settings, output=output)
    assert process.wait(timeout=240) == 0, output.read_text()
    check_nothing_runs(run)
    (main,) = json.loads((run.root / "probe.json").read_text())["teachers"]
    assert main["reverse_kl"] > 0.01 and main["forward_kl"] > 0.01 and main["exact"]
    assert main["accuracy"] is None and main["overlap"] is None
