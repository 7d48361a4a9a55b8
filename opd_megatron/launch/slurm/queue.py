"""Slurm's own commands, and what they say of a run's job. Needs no accounting: `sacct` is asked last, if at all.

The run directory is the truth about the run (DONE, commits, metrics); Slurm is asked only whether a job waits or runs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.errors import ConfigError, OpdError, ServerError
from opd_megatron.rundir import RunDir

# A controller that does not answer must not hang a command line.
_TIMEOUT_S = 30
_LIVING = {
    "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
}  # fmt: skip
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
UNKNOWN, GONE = "UNKNOWN", "GONE"
# Of what sbatch says, that which another try may mend.
_NO_ANSWER = (
    "Unable to contact",
    "timed out",
    "Zero Bytes",
    "onnection refused",
    "emporarily unable",
)


@dataclass(frozen=True)
class JobState:
    """`state` is Slurm's word, GONE when Slurm no longer knows the job, UNKNOWN when it could not be asked."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def is_alive(self) -> bool:
        return self.state in _LIVING

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITING


def call(argv: Sequence[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        ConfigError: it is not installed here.
        ServerError: no answer in time.
    """
    if shutil.which(argv[0]) is None:
        raise ConfigError.of(
            argv[0], "", "is not on this machine", "run this on a login node of the cluster"
        )
    try:
        return subprocess.run(
            list(argv), input=given, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{argv[0]}: no answer after {_TIMEOUT_S} s") from error


def submit_script(script: Path, options: Sequence[str] = ()) -> str:
    """`sbatch`; returns the job id.

    Raises:
        ConfigError, ServerError: as `refusal`.
    """
    done = call(["sbatch", "--parsable", *options, str(script)])
    if done.returncode:
        raise refusal(done.stderr.strip() or done.stdout.strip())
    return done.stdout.strip().splitlines()[-1].split(";")[0]


def refusal(words: str) -> OpdError:
    """What sbatch said: a request that can never be granted, or a controller that is not there just now."""
    said = " ".join(words.replace("sbatch: error: ", "").split())
    if any(text in said for text in _NO_ANSWER):
        return ServerError(f"sbatch: {said}")
    return ConfigError(
        f"sbatch: {said}; compare the site file with `sinfo` and `sacctmgr show assoc`"
    )


def jobs_of(run: RunDir) -> list[str]:
    """Ids of the run's jobs, oldest first."""
    path = run.slurm.jobs
    # The submitter and the job itself may both have written it.
    return list(dict.fromkeys(path.read_text().split())) if path.exists() else []


def add_job(run: RunDir, job: str) -> None:
    with run.slurm.jobs.open("a") as file:
        file.write(f"{job}\n")


def state_of(job: str) -> JobState:
    """What Slurm says: the controller while it remembers the job, then accounting, else GONE."""
    done = call(["scontrol", "-o", "show", "job", job])
    if done.returncode == 0:
        return parse_job(job, done.stdout)
    if "Invalid job id" not in done.stderr:
        return JobState(job, UNKNOWN, done.stderr.strip())
    if shutil.which("sacct"):
        done = call(["sacct", "-n", "-X", "-P", "-j", job, "-o", "State,NodeList"])
        fields = (done.stdout.strip().splitlines() or [""])[-1].split("|")
        if done.returncode == 0 and fields[0]:
            return JobState(job, fields[0].split()[0], "", fields[-1])
    return JobState(job, GONE)


def known_state_of(job: str) -> JobState:
    """
    Raises:
        ServerError: Slurm could not be asked.
    """
    state = state_of(job)
    if state.state == UNKNOWN:
        raise ServerError(f"Slurm can not say how job {job} is: {state.reason}")
    return state


def parse_job(job: str, text: str) -> JobState:
    """One line of `scontrol -o show job` for a job, or for the leader of a heterogeneous one."""
    found = dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0] if text else ""))
    return JobState(
        job,
        found.get("JobState", UNKNOWN),
        found.get("Reason", "").replace("None", ""),
        found.get("NodeList", "").replace("(null)", ""),
        int(found.get("Restarts", "0") or 0),
    )


def living_job(run: RunDir) -> JobState | None:
    """The run's job that waits or runs, if any: the newest first."""
    for job in reversed(jobs_of(run)):
        state = known_state_of(job)
        if state.is_alive or state.is_waiting:
            return state
    return None


def refuse_living_job(run: RunDir) -> None:
    """For a run that is to go on outside Slurm, in a directory that jobs have used.

    Raises:
        ConfigError: one of its jobs waits or runs, or nobody here can tell.
    """
    if not run.slurm.owner.exists() or run.done.exists():
        return
    if shutil.which("scontrol") is None:
        numbers = run.attempts()
        if numbers and not run.attempt(numbers[-1]).ended.exists():
            owner = run.slurm.owner.read_text().strip()
            raise ConfigError.of(
                "--run-dir", str(run.root), f"job {owner} may be alive, and Slurm is not here to ask",
                "cancel it and resume on a login node",
            )  # fmt: skip
        return
    living = living_job(run)
    if living is not None:
        raise ConfigError.of(
            "--run-dir", str(run.root), f"job {living.job} is {living.state}", "opd cancel it first"
        )


def cancel(run: RunDir) -> list[str]:
    """Mark the run as cancelled and cancel its jobs, successors included; returns their ids.

    Raises:
        ServerError: Slurm could not be asked, or did not do it; jobs may be alive.
    """
    run.slurm.cancelled.touch()
    found: list[str] = []
    for job in jobs_of(run):
        state = known_state_of(job)
        if state.is_alive or state.is_waiting:
            done = call(["scancel", job])
            if done.returncode:
                raise ServerError(f"scancel {job}: {done.stderr.strip()}")
            found.append(job)
    return found


@dataclass(frozen=True)
class Progress:
    """What the run directory says."""

    step: int
    steps: int
    attempts: int
    commit: str
    done: bool
    metrics: dict[str, Any]


def progress(run: RunDir, steps: int) -> Progress:
    row: dict[str, Any] = {}
    if run.metrics.exists():
        with run.metrics.open("rb") as file:
            file.seek(max(0, run.metrics.stat().st_size - 64 * 1024))
            whole = [line for line in file.read().splitlines() if line.endswith(b"}")]
        row = json.loads(whole[-1]) if whole else {}
    commits = sorted(path.name for path in run.checkpoints.glob("step_*"))
    return Progress(
        int(row.get("step", 0)),
        steps,
        len(run.attempts()),
        commits[-1] if commits else "",
        run.done.exists(),
        row,
    )
