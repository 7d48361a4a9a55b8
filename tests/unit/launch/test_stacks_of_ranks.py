"""What ranks that hang are asked before they are ended, with processes that stand in for them by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from opd_megatron.launch.members import membership
from opd_megatron.launch.stacks import dump_stacks, ranks
from opd_megatron.lifeline import RANK_NAME

_HANGS = """
import ctypes, faulthandler, signal, sys, time
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
faulthandler.register(signal.SIGUSR1)
print("up", flush=True)
def waits_for_ever():
    while True:
        time.sleep(0.05)
waits_for_ever()
"""


@contextmanager
def rank(identity: str, number: int, log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A process that an agent would take for a rank, hanging in `waits_for_ever`."""
    environment = {**os.environ, **membership(identity, "learner")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _HANGS, f"{RANK_NAME}-{number}"],
            stdout=file,
            stderr=file,
            env=environment,
        )
    try:
        while "up" not in log.read_text():
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def test_ranks_write_their_stacks_and_a_stopped_one_is_named(tmp_path: Path) -> None:
    identity = f"stacks-{os.getpid()}"
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    said: list[str] = []
    with rank(identity, 0, logs[0]), rank(identity, 1, logs[1]) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        assert len(ranks(identity)) == 2
        assert ranks("another") == []
        assert dump_stacks(identity, said.append) == 2
    assert said == [f"learner rank 1 (pid {stopped.pid}) was stopped"]
    for log in logs:
        assert "in waits_for_ever" in log.read_text()
