"""The planner's check: constants are recovered from two runs, and an error of a stage shows as one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.planner_cases import CALIBRATION, RUNS, RunCase
from benchmarks.planner_published import published
from benchmarks.planner_report import calibrate, predict_run, render
from opd_megatron.config.overrides import leaf_type
from opd_megatron.config.recipes import load_recipe, override_recipe

STEP_S, SEQUENCE_S, SCORE_S, LEARNER_S, TOKEN_S, SYNC_S = 0.01, 2e-4, 1e-3, 0.5, 1e-4, 0.3
LENGTH, PROMPT = 16, 8


def a_run(case: RunCase) -> dict[str, Any]:
    """What a machine of these constants would measure; nothing of the teacher hides."""
    recipe = override_recipe(load_recipe("demo")[0], case.overrides)
    samples = recipe.batch.samples_per_step
    each = samples // recipe.rollout.server.num_servers
    tokens = samples * (LENGTH + PROMPT) / recipe.learner.data_parallel
    return {
        "rollout": LENGTH * (STEP_S + each * SEQUENCE_S),
        "teacher": samples * SCORE_S,
        "learner": LEARNER_S + tokens * TOKEN_S,
        "publish": 0.1,
        "sync": SYNC_S - 0.1,
        "len_mean": float(LENGTH),
    }


def test_two_runs_give_the_constants_and_the_constants_the_other_runs() -> None:
    runs = {case.name: a_run(case) for case in (*CALIBRATION, *RUNS)}
    device = calibrate(runs)
    found = device.overheads
    assert found.decode_step_s == pytest.approx(STEP_S)
    assert found.decode_sequence_s == pytest.approx(SEQUENCE_S)
    assert found.prefill_s == pytest.approx(SCORE_S)
    assert (found.learner_step_s, found.learner_token_s) == pytest.approx((LEARNER_S, TOKEN_S))
    assert found.sync_s == pytest.approx(SYNC_S)
    for case in RUNS:
        time, run = predict_run(case, runs[case.name], device), runs[case.name]
        if "at most" in case.name:
            continue  # its limit is below the length that this machine pretends
        assert time.rollout == pytest.approx(run["rollout"], rel=1e-6), case.name
        assert time.learner == pytest.approx(run["learner"], rel=1e-6), case.name


def test_the_table_names_the_error_of_a_run_and_what_was_not_run() -> None:
    runs = {case.name: a_run(case) for case in CALIBRATION}
    slow = a_run(RUNS[0])
    slow["learner"] += sum(slow[k] for k in ("rollout", "teacher", "learner", "publish", "sync"))
    runs[RUNS[0].name] = slow
    text = render({"runs": runs, "memory": {"a": {"measured": 100, "predicted": 110}}})
    row = next(line for line in text.splitlines() if line.startswith(f"| {RUNS[0].name} |"))
    assert "-50%" in row
    assert f"| {RUNS[1].name} | not run |" in text
    assert "+10.0%" in text


def test_every_override_of_a_case_is_a_key_of_the_recipe() -> None:
    for case in (*CALIBRATION, *RUNS):
        for override in case.overrides:
            leaf_type(override.partition("=")[0])
    assert len(RUNS) >= 6


def test_published_training_speeds_are_met_and_steps_are_bounded_from_below() -> None:
    for row in published():
        if row.unit == "tokens/s":
            assert row.predicted == pytest.approx(row.measured, rel=0.01), row.what
        else:
            assert row.predicted < row.measured, row.what
