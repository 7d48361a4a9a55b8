"""A save that dies anywhere leaves a commit that loads; a damaged commit gives way to the one before.

The saves are of a real (tiny) learner state through Megatron's distributed checkpoints: most of one rank, which tries
every call; then of two ranks, which die separately.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

WORKER = Path(__file__).with_name("megatron_commit_worker.py")
TWO_RANKS = Path(__file__).with_name("megatron_ranks_worker.py")
REPOSITORY = Path(__file__).parents[2]


def run(
    work: Path, what: str, trials: int = 0, timeout_s: float = 280, worker: Path = WORKER
) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, str(worker), str(work), what, str(trials)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads((work / f"{what}.json").read_text())


def check_random(result: dict[str, Any], trials: int) -> None:
    # That every left commit loads and none is ever lost is asserted by the worker, kill by kill.
    assert result["kills"] == trials
    assert result["in_the_middle_of_a_save"] > trials // 4, "most kills missed the saves"
    assert result["after_a_commit"] > trials // 20, "no save ever got through"
    assert len(result["commits_at_the_end"]) >= 2


@pytest.mark.ci
def test_200_kills_at_random_moments_always_leave_a_commit_that_loads(tmp_path: Path) -> None:
    """Every other save is beside the training."""
    check_random(run(tmp_path / "work", "random", 200), 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_2000_kills_at_random_moments_always_leave_a_commit_that_loads(tmp_path: Path) -> None:
    check_random(run(tmp_path / "work", "random", 2000, timeout_s=3500), 2000)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("calls", marks=pytest.mark.slow),  # a torn write is the harder case
        "torn_calls",
        pytest.param("background_torn_calls", marks=pytest.mark.slow),
    ],
)
def test_a_kill_or_power_loss_at_every_call_that_changes_the_disk_leaves_a_commit(
    tmp_path: Path, what: str
) -> None:
    result = run(tmp_path / "work", what)
    calls = result["calls"]
    assert result["kills"] == sum(calls.values())
    assert {"write", "fsync", "rename", "create", "mkdir", "unlink", "rmdir"} == set(calls)
    assert calls["fsync"] >= calls["create"], "every file is made durable"
    for what_happened in ("kill", "power loss"):
        old, new = result["old_or_new"][what_happened]
        assert old + new == result["kills"]
        # Until the rename the old commit is the newest, from then on the new one.
        assert old > 0 and new > 0
    assert result["newest"] == 4, "a finished commit survives a power loss at once"


def test_a_flipped_bit_a_cut_or_a_missing_file_gives_way_to_the_commit_before(
    tmp_path: Path,
) -> None:
    loaded = run(tmp_path / "work", "damage")["loaded"]
    damaged = {name.split("/")[-1] for name in loaded}
    # Megatron-Core 0.16 also writes common.pt.
    assert damaged >= {"controller.json", "manifest.json", ".metadata", "metadata.json"}
    assert "__0_0.distcp" in damaged and len(loaded) == 3 * len(damaged)
    assert set(loaded.values()) == {1}


def test_ranks_that_die_separately_leave_the_commit_before_and_do_not_hang(tmp_path: Path) -> None:
    """That the other rank ends by itself and what both load is asserted by the worker, kill by kill."""
    result = run(tmp_path / "work", "separate", worker=TWO_RANKS)
    assert set(result["kills"]) == {"0", "1"} and min(result["kills"].values()) >= 2
    assert result["slowest_s"] < 60


@pytest.mark.slow
def test_two_ranks_turn_away_from_a_damaged_commit_together(tmp_path: Path) -> None:
    loaded = run(tmp_path / "work", "damage", worker=TWO_RANKS)["loaded"]
    names = {entry.split(" ")[1] for entry in loaded}
    assert names >= {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"}
    assert all(steps == [1, 1] for steps in loaded.values()), loaded
