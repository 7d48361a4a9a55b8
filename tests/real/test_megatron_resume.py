"""Resuming in the same layout is bitwise, wherever a run of 20 steps on recorded rollouts is split.

Resuming in another layout is in test_megatron_layouts.py, kills are in test_megatron_commits.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_cases import RESUMED, STEPS

pytestmark = pytest.mark.real

WORKER = Path(__file__).with_name("megatron_resume_worker.py")
REPOSITORY = Path(__file__).parents[2]
FIRST = next(iter(RESUMED))
LAYOUTS = [pytest.param(name, marks=[] if name == FIRST else pytest.mark.slow) for name in RESUMED]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_split_of_20_steps_ends_at_the_same_bits(tmp_path: Path, layout: str) -> None:
    launch = [sys.executable, "-m", "opd_megatron.megatron.torchrun", "--opd-fork"]
    run = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(WORKER), str(tmp_path), layout],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    seen = json.loads((tmp_path / f"{layout}.json").read_text())
    assert len(seen["splits"]) == STEPS - 1
    for split, case in seen["splits"].items():
        assert case == {
            "loaded": int(split),
            "ended": STEPS,
            "metrics_that_differ": 0,
            "ranks_that_draw_differently": 0,
            "tensors_that_differ": 0,
        }
    # A run in which nothing changed would pass too.
    assert len(set(seen["losses"])) == STEPS and len(set(seen["rates"])) > STEPS // 2
    assert len(set(seen["drawn"])) > 3 * STEPS
