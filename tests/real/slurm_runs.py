"""Runs on the virtual cluster from outside: submit as a user does, look at jobs, nodes, processes and files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from slurm_cluster import Cluster
from whole_runs import ROOT, SMALL, wait_until

from opd_megatron.atomic import read_json
from opd_megatron.launch.slurm.queue import jobs_of
from opd_megatron.rundir import RunDir


def opd(cluster: Cluster, *arguments: str, code: int = 0) -> str:
    """One call of the command line on the cluster's login node; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron", *arguments],
        cwd=ROOT,
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(cluster: Cluster, folder: Path, *overrides: str, via: str = "sbatch") -> RunDir:
    """Submit a small demo; returns its run directory."""
    run = RunDir(folder / "run")
    opd(
        cluster,
        *("submit", "demo", *SMALL, *overrides, "--cluster", "cpu-test", "--allow-dirty"),
        *("--run-dir", str(run.root), "--via", via),
    )
    return run


def log(run: RunDir) -> str:
    return run.slurm.log.read_text() if run.slurm.log.exists() else ""


def wait_for(run: RunDir, condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`; on the way the job's output is not lost."""
    try:
        return wait_until(condition, seconds, what, every=0.2)
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
    wait_for(run, lambda: processes(cluster, jobs_of(run)) == [], 20, "the processes to end")


def processes(cluster: Cluster, jobs: list[str]) -> list[str]:
    """Command lines of everything that jobs of this cluster have alive."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            ours = environment.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
            if ours and environment.get("SLURM_JOB_ID") in jobs and process.status() != "zombie":
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def role_processes(cluster: Cluster, run: RunDir, words: str) -> list[psutil.Process]:
    """Processes of the run's jobs whose command line holds `words`."""
    jobs = jobs_of(run)
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if (
                words in " ".join(process.cmdline())
                and process.environ().get("SLURM_JOB_ID") in jobs
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def hosts(run: RunDir, attempt: int) -> dict[str, str]:
    """Role and node number -> host, but for the controller, which is on the learner's first node."""
    found = {p.stem: read_json(p)["host"] for p in run.attempt(attempt).nodes.glob("*.json")}
    assert found.pop("controller-0") == found["learner-0"]
    return found
