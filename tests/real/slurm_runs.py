"""Runs on the virtual cluster from outside: submit as a user does, look at jobs, nodes, processes and files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from slurm_cluster import Cluster
from whole_runs import ROOT, SMALL, command_line, rows, wait_until

from opd_megatron.atomic import read_json
from opd_megatron.launch.slurm.queue import jobs_of
from opd_megatron.lifeline import RANK_NAME
from opd_megatron.rundir import RunDir

# How much slower than a quiet machine of two cores one may be before a wait is given up.
PATIENCE = 3


def opd(cluster: Cluster, *arguments: str, code: int = 0) -> str:
    """One call of the command line on the cluster's login node; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron", *arguments],
        cwd=ROOT,
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def arguments_of(folder: Path, *overrides: str, via: str = "sbatch") -> list[str]:
    """`submit` and what stands after it, for a small demo in `folder`."""
    return _arguments(folder, [*SMALL, *overrides], via)


def _arguments(folder: Path, overrides: Sequence[str], via: str) -> list[str]:
    where = ["--cluster", "cpu-test", "--allow-dirty", "--run-dir", str(folder / "run")]
    return ["submit", "demo", *overrides, *where, "--via", via]


def submit(cluster: Cluster, folder: Path, *overrides: str, via: str = "sbatch") -> RunDir:
    """Submit a small demo; returns its run directory."""
    opd(cluster, *arguments_of(folder, *overrides, via=via))
    return RunDir(folder / "run")


def whole_demo(folder: Path, via: str, *overrides: str) -> list[str]:
    """`submit` and what stands after it, for the demo as it is but for the evaluations on its way."""
    own = ["evaluation.every=0", "cluster.time=00:30:00"]
    return _arguments(folder, [*overrides, *own], via)


def last_step(run: RunDir) -> int:
    return max((row["step"] for row in rows(run.metrics)), default=0)


def check_whole(run: RunDir, attempts: int) -> None:
    """It learned what the demo learns, in so many attempts, and lost nothing."""
    summary = json.loads(run.summary.read_text())
    assert summary["accuracy_after"] > 0.8 > summary["accuracy_before"]
    assert summary["attempts"] == attempts
    ledger = summary["ledger"]
    assert (ledger["issued"], ledger["rejected"], ledger["in_flight"]) == (ledger["trained"], {}, 0)
    assert [row["step"] for row in rows(run.metrics)] == list(range(last_step(run) + 1))


def log(run: RunDir) -> str:
    return run.slurm.log.read_text() if run.slurm.log.exists() else ""


def wait_for(run: RunDir, condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`, within `PATIENCE * seconds`; on the way the job's output is not lost."""
    try:
        return wait_until(condition, PATIENCE * seconds, what, every=0.2)
    except AssertionError as error:
        logs = "".join(
            f"\n== {p}\n{p.read_text()[-1500:]}" for p in sorted(run.logs.rglob("*.log"))
        )
        raise AssertionError(f"{error}\n{log(run)}{logs}") from None


def wait_done(cluster: Cluster, run: RunDir, seconds: float = 240) -> None:
    wait_for(run, run.done.exists, seconds, "DONE")
    wait_over(cluster, run)


def wait_over(cluster: Cluster, run: RunDir, seconds: float = 60) -> None:
    """Until no job of the run waits or runs, and no process of one is left."""

    def over() -> bool:
        states = {cluster.state(job) for job in jobs_of(run)}
        return states <= {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE"}

    wait_for(run, over, seconds, "the jobs to end")
    try:
        wait_for(run, lambda: not job_processes(cluster, jobs_of(run)), 20, "the processes to end")
    except AssertionError as error:
        left = "\n".join(str(p.as_dict(_SHOWN)) for p in job_processes(cluster, jobs_of(run)))
        raise AssertionError(f"{left}\n{error}") from None


# What a report says of a process that is left.
_SHOWN = ("pid", "ppid", "cmdline", "status", "create_time")


def job_processes(cluster: Cluster, jobs: Sequence[str]) -> list[psutil.Process]:
    """Everything that jobs of this cluster have alive."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            ours = environment.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
            if ours and environment.get("SLURM_JOB_ID") in jobs and process.status() != "zombie":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def role_processes(cluster: Cluster, run: RunDir, words: str) -> list[psutil.Process]:
    """Processes of the run's jobs whose command line holds `words`."""
    found = job_processes(cluster, jobs_of(run))
    return [process for process in found if words in command_line(process)]


def kill_server(cluster: Cluster, run: RunDir, role: str, model: str) -> None:
    """Kill the role's only server and wait until its agent has started it again."""
    (server, *_) = [
        p
        for p in role_processes(cluster, run, "sglang_main")
        if any(word.endswith(model) for word in p.cmdline())
    ]
    server.kill()
    agent_log = run.role_logs(1, role) / "agent-0.log"
    line = f"{role}-0 ended with signal SIGKILL and is started again (1 of 3)"
    wait_for(run, lambda: line in agent_log.read_text(), 60, f"{role} to come back")


def learner_ranks(cluster: Cluster, run: RunDir) -> list[psutil.Process]:
    """The learner's ranks, rank 0 first. Forked from torchrun, they have its command line and environment."""
    named: list[tuple[str, psutil.Process]] = []
    for process in job_processes(cluster, jobs_of(run)):
        try:
            named.append((process.name(), process))
        except psutil.NoSuchProcess:
            continue
    ranks = sorted((name, p.pid, p) for name, p in named if name.startswith(RANK_NAME))
    return [process for _, _, process in ranks]


# Words of a command line that only the running job knows.
_VALUES = ("--host", "--port", "--parent-pid", "--opd-nodes")


def _masked(argv: Sequence[str]) -> list[str]:
    return ["*" if i and argv[i - 1] in _VALUES else word for i, word in enumerate(argv)]


def promised(dry_run: str) -> dict[str, list[str]]:
    """Process name and node -> command, as a dry run says, without its environment."""
    found: dict[str, list[str]] = {}
    for line in dry_run.splitlines():
        said = re.fullmatch(r"# (\S+ on node \d+): (.*)", line)
        if said:
            words = shlex.split(said[2])
            program = next(i for i, word in enumerate(words) if "=" not in word)
            found[said[1]] = _masked(words[program:])
    return found


def commands(cluster: Cluster, run: RunDir) -> list[list[str]]:
    """Command lines of everything that the run's jobs have alive, masked as those of `promised`."""
    return [_masked(p.cmdline()) for p in job_processes(cluster, jobs_of(run))]


def hosts(run: RunDir, attempt: int) -> dict[str, str]:
    """Role and node number -> host, but for the controller, which is on the learner's first node."""
    found = {p.stem: read_json(p)["host"] for p in run.attempt(attempt).nodes.glob("*.json")}
    assert found.pop("controller-0") == found["learner-0"]
    return found
