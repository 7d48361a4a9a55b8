"""The demo on the learner layouts that an override chooses, and what a user does with the result: evaluate, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = [
    *("evaluation.problems=8", "evaluation.samples_per_problem=2", "evaluation.kl_problems=8"),
]
SETTINGS = [
    *("steps=3", "checkpoint.every=3", "evaluation.every=0", "batch.prompts_per_step=16"),
    "learner.tensor_parallel=1",
]
LAYOUTS = [
    ("TP=1 PP=2 CP=1 DP=1 = 2 ranks", ["learner.pipeline_parallel=2"]),
    ("TP=1 PP=1 CP=1 DP=2 = 2 ranks", ["learner.data_parallel=2", "batch.padded=true"]),
]
# What is broadcast was gathered during a forward pass that is over.
OVERLAPPED = [
    *("learner.data_parallel=2", "learner.distributed_optimizer=true"),
    *("learner.overlap_param_gather=true", "weight_sync.route=broadcast"),
]


def opd(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_demo(run: Path, *overrides: str) -> str:
    output = opd("run", "demo", *SETTINGS, *EVALUATION, *overrides, "--run-dir", str(run))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ledger"] == {"issued": 48, "trained": 48, "rejected": {}, "in_flight": 0}
    assert summary["kl_after"] < summary["kl_before"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["offpolicy/logprob_diff_max"] for row in rows[1:]) < 1e-3
    return output


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one_rank") / "run"
    assert "TP=1 PP=1 CP=1 DP=1 = 1 ranks" in run_demo(run)
    return run


@pytest.mark.parametrize(("layout", "overrides"), LAYOUTS, ids=[words for words, _ in LAYOUTS])
def test_the_demo_runs_on_two_ranks(layout: str, overrides: list[str], tmp_path: Path) -> None:
    assert layout in run_demo(tmp_path / "run", *overrides)


def test_overlapped_gathers_reach_the_servers_by_broadcast_whole(tmp_path: Path) -> None:
    output = run_demo(tmp_path / "run", *OVERLAPPED)
    assert "rollout servers hold weights v0" in output and "were sent twice" not in output
    assert not (tmp_path / "run" / "weights").exists()


def test_a_finished_run_and_its_export_are_the_same_model(one_rank: Path, tmp_path: Path) -> None:
    """Both are served by SGLang; the exact KL to a teacher differs for other weights."""
    out = tmp_path / "student"
    opd("export", str(one_rank), "--out", str(out))
    # Responses are sampled, so the same ones are compared: greedy.
    greedy = [*EVALUATION, "evaluation.temperature=0"]
    opd("eval", str(one_rank), *greedy, "--run-dir", str(tmp_path / "a"))
    opd("eval", "demo", *greedy, "--model", str(out), "--run-dir", str(tmp_path / "b"))
    of_run, of_export = (json.loads((tmp_path / n / "eval.json").read_text()) for n in "ab")
    assert of_run["eval/heldout/accuracy"] == of_export["eval/heldout/accuracy"]
    assert of_run["eval/heldout/kl_reverse"] == pytest.approx(
        of_export["eval/heldout/kl_reverse"], abs=1e-5
    )
    assert of_run["settings"] == of_export["settings"]
