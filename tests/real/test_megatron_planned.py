"""Objectives that couple tokens give the same step however the batch is cut over micro-batches and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
OBJECTIVES = {
    "entropy filter, sequence mean": 1,
    "teacher entropy filter on a support": 1,
    "discount, sequence ratios": 1,
    "task in groups, two clipped updates": 2,
    "whitened sum, geometric mean, kl filter": 1,
}
LAYOUTS = [
    "many micro-batches",
    "tensor and sequence parallel",
    "context parallel",
    "pipeline, chunked loss",
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("planned")
    launch = [sys.executable, "-m", "opd_megatron.megatron.torchrun", "--opd-fork"]
    worker = str(HERE / "megatron_planned_worker.py")
    run = subprocess.run(
        [*launch, "--nproc-per-node", "2", worker, str(work), "planned"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((work / "planned.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_cut_of_the_batch_gives_the_same_step(
    steps: dict[str, Any], objective: str, layout: str
) -> None:
    case = steps[f"{objective}-{layout}"]
    assert (case["updates"], case["why_not_applied"]) == (OBJECTIVES[objective], None)
    assert case["tokens"][0] == case["tokens"][1] and case["kept_differently"] == 0
    assert case["metrics"] == {}
    assert max(case["values"].values()) <= 1e-5, case["values"]
    assert case["gradient"] <= 1e-5
    assert case["weights"] <= 1e-5


def test_a_student_with_a_nan_ends_the_step_before_the_plan(steps: dict[str, Any]) -> None:
    case = steps["broken student"]
    assert case["updates"] == 0 and case["unchanged"]
    assert "is not finite: sample " in case["why_not_applied"]
