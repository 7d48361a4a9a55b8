"""Whole runs in which the student writes while the learner trains: every prompt once, no token beyond the bound.

The kill falls into a training step, when rollouts of later steps are under way, scored or waiting: after the resume
they are all there again, once. Kills at random moments: `kill_runs.py` with the same overrides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kill_runs import Plan, kill_once
from whole_runs import SMALL, check_finished, check_nothing_runs, rows, start

from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

STEPS = 6
MODES = {
    "one_step_off": ["overlap.mode=one_step_off", "max_staleness=1"],
    "async": ["overlap.mode=async", "max_staleness=2"],
}


def settings(mode: str) -> list[str]:
    # One server less to start; with a served teacher `make bench-overlap` runs them.
    teacher = "teachers.main.engine=in_process"
    return [*MODES[mode], f"steps={STEPS}", "checkpoint.every=2", "evaluation.every=3", teacher]


def trained_rows(run: RunDir) -> list[dict[str, Any]]:
    return rows(run.metrics)[1:]


def check_ages(run: RunDir, mode: str, steps_on_policy: set[int]) -> None:
    metrics = {row["step"]: row for row in trained_rows(run)}
    bound = 1 if mode == "one_step_off" else 2
    for step, row in metrics.items():
        assert 0 <= row["offpolicy/token_age_mean"] <= row["offpolicy/age_mean"] <= bound
        assert row["offpolicy/age_max"] <= bound
        if step in steps_on_policy:
            assert row["offpolicy/age_max"] == 0
        elif mode == "one_step_off":
            assert row["offpolicy/age_mean"] == 1.0 and row["offpolicy/mixed_frac"] == 0.0
    assert max(row["offpolicy/age_max"] for row in metrics.values()) >= 1


CONVERSATION = [
    *("environment.name=try_again", "environment.grader=column_addition"),
    *("environment.max_turns=2", "environment.max_observation_tokens=10"),
]


@pytest.mark.slow
def test_one_step_off_with_conversations(tmp_path: Path) -> None:
    run, output = RunDir(tmp_path / "run"), tmp_path / "output.txt"
    arguments = ["run", "demo", "--run-dir", str(run.root), *SMALL, *settings("one_step_off")]
    arguments += CONVERSATION
    process = start(*arguments, output=output)
    assert process.wait(timeout=240) == 0, output.read_text()
    check_nothing_runs(run)
    check_finished(run, STEPS)
    check_ages(run, "one_step_off", {1})
    assert " age 1.0 keep " in output.read_text()
    # The untrained student is right about one time in three.
    for row in trained_rows(run):
        assert 1.0 < row["rollout/turns_mean"] <= 2.0
        assert 0.0 <= row["rollout/environment_reward_mean"] < 1.0
    # The first step is on-policy: the engines agree about the tokens of both turns.
    assert trained_rows(run)[0]["offpolicy/logprob_diff_max"] < 1e-3


@pytest.mark.parametrize("mode", [pytest.param("one_step_off", marks=pytest.mark.slow), "async"])
def test_a_run_that_is_killed_while_it_overlaps_goes_on(tmp_path: Path, mode: str) -> None:
    run, output = RunDir(tmp_path / "run"), tmp_path / "output.txt"
    outcome = kill_once(run, Plan("rank", "training", 0.2, 3), 0, 0, output, settings(mode))
    assert outcome is not None and outcome.code == 75 and outcome.commit_after >= 2
    process = start("run", "demo", "--run-dir", str(run.root), "--resume", output=output)
    assert process.wait(timeout=240) == 0, output.read_text()
    check_nothing_runs(run)
    check_finished(run, STEPS)
    check_ages(run, mode, {1, outcome.commit_after + 1})
