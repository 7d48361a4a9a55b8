"""Whole runs from outside, as a user meets them: start `opd`, look at its processes, check what a run left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from opd_megatron.controller import commit
from opd_megatron.launch.members import ATTEMPT_VARIABLE, scratch_folder
from opd_megatron.lifeline import RANK_NAME
from opd_megatron.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = 4
_SERVERS = ("rollout", "teacher")
# As little work as a run can have, so that most of a second attempt is its start.
SMALL = [
    f"batch.prompts_per_step={PROMPTS}",
    *("evaluation.problems=4", "evaluation.samples_per_problem=2", "evaluation.kl_problems=1"),
    *("preflight.samples=2", "checkpoint.every=1", "evaluation.every=2"),
    "observe.show_rollout_every=0",
]


def start(
    *arguments: str, output: Path, before: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    """Start `opd` in a session of its own, after `before`; stdout and stderr go to `output`."""
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "opd_megatron", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=before,
        )


def wait_until(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.02) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(every)
    return value


def rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file that may be growing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def identities(run: RunDir) -> set[str]:
    paths = (run.attempt(number).identity for number in run.attempts())
    return {path.read_text() for path in paths if path.exists()}


def members(run: RunDir) -> list[psutil.Process]:
    """Living processes of any attempt of a run; the supervisor is not one of them."""
    wanted = identities(run)
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            is_member = process.environ().get(ATTEMPT_VARIABLE) in wanted
            if is_member and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def describe(process: psutil.Process) -> str:
    """For the message of a test that fails because this process is alive."""
    try:
        return f"{process.pid} {process.status()} parent {process.ppid()}: {command_line(process)}"
    except psutil.NoSuchProcess:
        return f"{process.pid}: gone now"


def of_role(run: RunDir, role: str) -> list[psutil.Process]:
    """Processes of one role: controller, agent, rank, rollout or teacher (a server's workers included)."""
    words = {
        "controller": ("controller.main",),
        "agent": ("megatron.torchrun",),
        "rank": ("megatron.learner",),
        "rollout": ("sglang_main", "demo/student"),
        "teacher": ("sglang_main", "demo/teacher"),
    }[role]
    found = []
    for process in members(run):
        line = command_line(process)
        # A rank is forked from torchrun and has its command line.
        is_rank = process.is_running() and process.name().startswith(RANK_NAME)
        if all(word in line for word in words) and is_rank == (role == "rank"):
            found.append(process)
    return [
        *found,
        *(worker for server in found if role in _SERVERS for worker in children(server)),
    ]


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ports(run: RunDir) -> list[int]:
    """Server ports of the newest attempt."""
    numbers = run.attempts()
    path = run.attempt(numbers[-1]).endpoints if numbers else None
    if path is None or not path.exists():
        return []
    servers = [server for group in json.loads(path.read_text()).values() for server in group]
    return [port for server in servers if (port := urlsplit(server["url"]).port) is not None]


def is_busy(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_nothing_runs(run: RunDir, seconds: float = 30.0) -> None:
    """No process of the run and no busy port."""
    deadline = time.monotonic() + seconds
    while alive := members(run):
        assert time.monotonic() < deadline, [describe(process) for process in alive]
        time.sleep(0.05)
    # A process gives back its memory, which names its run, a moment before its sockets.
    wait_until(
        lambda: not any(is_busy(port) for port in ports(run)), seconds, "the ports to be free"
    )


def check_commits(run: RunDir) -> int:
    """The newest commit verifies and its ledger adds up; returns its step, 0 when there is none."""
    newest = commit.newest(run.checkpoints, lambda line: None)
    if newest is None:
        return 0
    ledger = newest.state["ledger"]
    accounted = ledger["trained"] + sum(ledger["rejected"].values()) + len(ledger["in_flight"])
    assert ledger["next_position"] == accounted
    assert ledger["trained"] == newest.step * PROMPTS
    return newest.step


def check_finished(run: RunDir, steps: int) -> None:
    """Every prompt was trained exactly once, every step has one row, and nothing is left lying about."""
    assert check_commits(run) == steps
    ledger = rows(run.ledger)
    assert [row["step"] for row in ledger] == list(range(1, steps + 1))
    positions = [position for row in ledger for position in row["positions"]]
    assert sorted(positions) == list(range(steps * PROMPTS))
    prompts = [prompt for row in ledger for prompt in row["prompt_ids"]]
    assert len(set(prompts)) == len(prompts) == steps * PROMPTS
    assert [row["step"] for row in rows(run.metrics)] == list(range(steps + 1))
    summary = json.loads(run.summary.read_text())
    total = steps * PROMPTS
    assert summary["ledger"] == {"issued": total, "trained": total, "rejected": {}, "in_flight": 0}
    assert summary["attempts"] == len(run.attempts())
    assert run.report.exists()
    check_tidy(run)


def check_tidy(run: RunDir) -> None:
    """No temporary file, and of earlier attempts only what is meant to stay."""
    assert [*run.root.rglob("*.tmp"), *run.root.rglob("*.old")] == []
    assert len(commit.committed_steps(run.checkpoints)) <= 2
    assert len(run.published()) <= 2
    for number in run.attempts()[:-1]:
        attempt = run.attempt(number)
        left = {path.name for path in attempt.root.iterdir()}
        of_jobs = {"owner.json", "nodes", "ended", "stop_requested"}
        assert left <= {"attempt_id", "batches", "finishing"} | of_jobs, left
        assert list(attempt.batches.iterdir()) == []
    assert [i for i in identities(run) if scratch_folder(i).exists()] == []


def garbage_outside() -> set[str]:
    """What servers and torchrun leave in shared folders when they are killed."""
    folder = Path(tempfile.gettempdir())
    shared = Path("/dev/shm").glob("sglang_loads_*")
    return {
        p.name for p in (*folder.glob("torchelastic_*"), *folder.glob("opd-*[0-9a-f]"), *shared)
    }
