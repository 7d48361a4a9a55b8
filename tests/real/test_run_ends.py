"""Ends of whole runs that are not kills: signals, hangs, a full disk, a damaged run directory, two runs at once."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from whole_runs import (
    SMALL,
    check_finished,
    check_nothing_runs,
    members,
    of_role,
    start,
    wait_until,
)

from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


def begin(folder: Path, *overrides: str, **options):
    """Start a small run; returns it, its process and the file of its output."""
    run, output = RunDir(folder / "run"), folder / "output.txt"
    process = start(
        "run", "demo", *SMALL, *overrides, "--run-dir", str(run.root), output=output, **options
    )
    return run, process, output


def is_training(run: RunDir) -> bool:
    return any(run.checkpoints.glob("step_*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupted_run_leaves_nothing_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int, whole_group: bool
) -> None:
    run, process, output = begin(tmp_path, "steps=50")
    wait_until(lambda: len(members(run)) >= 4, 60, "the roles to start")
    time.sleep(1)
    send = os.killpg if whole_group else os.kill
    for _ in range(3):  # an impatient user
        send(process.pid, number)
        time.sleep(0.2)
    assert process.wait(timeout=120) == code, output.read_text()
    check_nothing_runs(run)
    assert f"{number.name}: everything stopped; go on with: opd run demo" in output.read_text()


def test_a_living_run_keeps_its_directory_from_a_second_one(tmp_path: Path) -> None:
    run, process, _ = begin(tmp_path, "steps=50")
    try:
        wait_until(run.lock.exists, 60, "the lock")
        wait_until(lambda: len(members(run)) >= 1, 60, "a role to start")
        for flag in ([], ["--resume"]):
            second = tmp_path / f"second{len(flag)}.txt"
            arguments = ["run", "demo", *SMALL, "--run-dir", str(run.root), *flag]
            refused = start(*arguments, output=second)
            assert refused.wait(timeout=120) == 78, second.read_text()
            assert f"a run is alive there (pid {process.pid})" in second.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    check_nothing_runs(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("rollout", "rollout-0"),
        ("teacher", "teacher-main-0"),
        ("rank", "no rank has moved for 15 s (learner.hang_timeout_s)"),
        ("controller", "controller hangs: no heartbeat for 20 s"),
    ],
)
def test_a_role_that_hangs_is_named_by_a_deadline(tmp_path: Path, role: str, words: str) -> None:
    run, process, output = begin(
        tmp_path,
        *("steps=2000", "controller.hang_timeout_s=20", "learner.hang_timeout_s=15"),
        *("rollout.server.request_timeout_s=10", "rollout.server.max_retries=0"),
        *("teachers.main.server.request_timeout_s=10", "teachers.main.server.max_retries=0"),
        # How long the run waits for a server that hangs to answer again.
        *("rollout.server.start_timeout_s=60", "teachers.main.server.start_timeout_s=60"),
    )
    wait_until(lambda: is_training(run) or process.poll() is not None, 200, "the first commit")
    stopped = time.monotonic()
    for victim in of_role(run, role):
        victim.suspend()
    assert process.wait(timeout=150) == 75, output.read_text()
    assert time.monotonic() - stopped < 120
    assert words in output.read_text()
    check_nothing_runs(run)


@pytest.mark.slow
def test_a_full_disk_costs_no_commit(tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: weights fit, the learner's checkpoint files do not."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600 * 1024, resource.RLIM_INFINITY))

    run, process, output = begin(tmp_path, "steps=4", before=limit)
    assert process.wait(timeout=240) == 75, output.read_text()
    assert "File too large" in output.read_text()
    check_nothing_runs(run)
    resumed = start("run", "demo", "--run-dir", str(run.root), "--resume", output=output)
    assert resumed.wait(timeout=240) == 0, output.read_text()
    check_finished(run, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    runs = [begin(tmp_path / name, "steps=3") for name in ("a", "b")]
    for run, process, output in runs:
        assert process.wait(timeout=300) == 0, output.read_text()
        check_nothing_runs(run)
        check_finished(run, 3)
