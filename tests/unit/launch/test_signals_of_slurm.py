"""Slurm signals every process of a step at once: only the agent may hear it, else nothing is left that could commit."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from opd_megatron.controller.stop import ended_by_stop
from opd_megatron.errors import Preempted
from opd_megatron.launch.role_command import RoleCommand
from opd_megatron.launch.supervisor import Supervisor
from opd_megatron.rundir import RunDir

# As an SGLang server or torchrun does: a handler of its own ends it.
_SERVER = (
    "import os, pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
    "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
    "time.sleep(60)\n"
)
_RANK = (
    "import pathlib, os, sys, time\n"
    "from opd_megatron.lifeline import end_at_parents_request\n"
    "end_at_parents_request()\n"
    "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
    "time.sleep(60)\n"
)


def _wait_for(path: Path) -> int:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def test_a_shielded_process_outlives_slurms_signals_and_ends_with_the_attempt(
    tmp_path: Path,
) -> None:
    up = tmp_path / "up"
    argv = [sys.executable, "-c", _SERVER, str(up)]
    with Supervisor(uuid.uuid4().hex, shielded=True) as roles:
        roles.start(RoleCommand("server", argv, tmp_path / "log", grace_s=20.0))
        pid = _wait_for(up)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
        time.sleep(0.2)
        os.kill(pid, 0)
        before = time.monotonic()
    assert time.monotonic() - before < 15, "nothing that can not be heard is waited for"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_rank_ends_when_its_parent_says_so_and_only_then(tmp_path: Path) -> None:
    up = tmp_path / "up"
    rank = subprocess.Popen(
        [sys.executable, "-c", _RANK, str(up)],
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
    )
    try:
        pid = _wait_for(up)
        subprocess.run(["kill", "-TERM", str(pid)], check=True)  # not its parent
        time.sleep(0.2)
        assert rank.poll() is None
        rank.terminate()
        assert rank.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        rank.kill()
        rank.wait()


def test_before_the_first_step_a_request_to_stop_ends_the_controller_at_once(
    tmp_path: Path,
) -> None:
    attempt = RunDir(tmp_path).attempt(1)
    attempt.root.mkdir(parents=True)

    async def start(seconds: float) -> str:
        async with ended_by_stop(attempt):
            await asyncio.sleep(seconds)
        return "started"

    assert asyncio.run(start(0.0)) == "started"
    attempt.stop_requested.touch()
    with pytest.raises(Preempted, match="before the first step"):
        asyncio.run(start(60.0))


def test_a_time_limit_of_the_start_itself_is_not_taken_for_a_request(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path).attempt(1)
    attempt.root.mkdir(parents=True)

    async def start() -> None:
        async with ended_by_stop(attempt):
            raise TimeoutError("a server")

    with pytest.raises(TimeoutError, match="a server"):
        asyncio.run(start())
