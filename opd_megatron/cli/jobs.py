"""`opd status`, `logs`, `cancel`, `resume`: a run that was submitted to Slurm. Runs on a login node, without torch."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.errors import ConfigError, ServerError
from opd_megatron.launch.slurm import grace, queue
from opd_megatron.launch.slurm.submit import resume
from opd_megatron.launch.slurm.table import read_table
from opd_megatron.rundir import RunDir

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
_FOLLOW_S = 0.5
# How long a log that is followed may be silent before Slurm is asked whether the run is over.
_ASK_S = 5.0


def print_submitted(run: RunDir, job: str) -> None:
    """The job, where the run is, and how to watch it."""
    typer.echo(f"job {job}")
    typer.echo(f"run directory {run.root}")
    typer.echo(f"tail -F {shlex.quote(str(run.slurm.log))}")


def _open(run_dir: Path) -> RunDir:
    run = RunDir(run_dir.resolve())
    read_table(run.slurm.table)
    return run


def _notice_of(run: RunDir) -> str | None:
    return grace.measured(run, read_table(run.slurm.table).grace_s)


def status(run_dir: RunArgument) -> None:
    """How a submitted run stands: its job, its nodes, its progress. Works without Slurm accounting."""
    run = _open(run_dir)
    recipe = read_run_yaml(run.run_yaml)
    seen = queue.progress(run, recipe.steps)
    jobs = queue.jobs_of(run)
    typer.echo(f"run {run.root}")
    state = None
    for job in jobs[-3:]:
        state = queue.state_of(job)
        typer.echo(_job_line(state))
        if state.state == queue.UNKNOWN:
            break
    typer.echo(
        f"step {seen.step} of {seen.steps}, attempts {seen.attempts}, newest commit {seen.commit or 'none'}"
    )
    if (notice := _notice_of(run)) is not None:
        typer.echo(notice)
    for name in ("eval/heldout/accuracy", "train/loss"):
        if isinstance(seen.metrics.get(name), float):
            typer.echo(f"{name} {seen.metrics[name]:.4g}")
    if seen.done:
        typer.echo("done")
    elif state is None:
        typer.echo(f"no job of it has begun; submit it with: sbatch {run.slurm.script}")
    elif not (state.state == queue.UNKNOWN or state.is_alive or state.is_waiting):
        typer.echo(f"not done; go on with: opd resume {run.root}")


def _job_line(state: queue.JobState) -> str:
    # Of a job that was cancelled Slurm still says why it had waited.
    reason = "" if state.state == "CANCELLED" else state.reason
    details = " ".join(text for text in (state.nodes, reason) if text)
    return f"job {state.job}: {state.state} {details}".rstrip() + f", restarts {state.restarts}"


def logs(
    run_dir: RunArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on as it grows, until the run is over.")
    ] = False,
    role: Annotated[
        str,
        typer.Option("--role", help="Of one role of the newest attempt, e.g. learner, rollout-0."),
    ] = "",
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many.")] = 40,
) -> None:
    """The job's output (the controller's lines over all attempts), or one role's log."""
    run = _open(run_dir)
    path = run.slurm.log
    if role:
        folder = run.logs / "latest"
        known = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
        if role not in known:
            raise ConfigError.of(
                "--role", role, "has no log", f"known: {', '.join(known) or 'none'}"
            )
        found = sorted((folder / role).glob("*.log"), key=lambda p: p.stat().st_size)
        if not found:
            raise ConfigError.of("--role", role, "has written nothing yet", "wait a moment")
        path = found[-1]
    if not path.exists():
        typer.echo(f"no output yet: {path}")
    if follow or path.exists():
        _tail(path, lines, (lambda: _is_over(run)) if follow else None)


def _is_over(run: RunDir) -> bool:
    """Nothing of the run will write any more; says why. Where Slurm can not be asked, only DONE counts."""
    if run.done.exists():
        return True
    try:
        living = queue.living_job(run)
    except (ConfigError, ServerError):
        return False
    if living is not None:
        return False
    typer.echo(f"no job of this run waits or runs; see: opd status {run.root}", err=True)
    return True


def _tail(path: Path, lines: int, is_over: Callable[[], bool] | None) -> None:
    """The end of a file; with `is_over` also what comes, until that is true."""
    while not path.exists():
        time.sleep(_ASK_S)
        if is_over is not None and not path.exists() and is_over():
            return
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 200 * lines - 65536))
        sys.stdout.buffer.write(b"".join(file.read().splitlines(keepends=True)[-lines:]))
        sys.stdout.buffer.flush()
        quiet_s, over = 0.0, False
        while is_over is not None:
            grown = file.read()
            if grown:
                sys.stdout.buffer.write(grown)
                sys.stdout.buffer.flush()
                quiet_s = 0.0
            elif over:
                return
            else:
                time.sleep(_FOLLOW_S)
                quiet_s += _FOLLOW_S
            # Asked before the last read, so that nothing written before the end is left out.
            if quiet_s >= _ASK_S:
                over, quiet_s = is_over(), 0.0


def cancel(run_dir: RunArgument) -> None:
    """Cancel a run's jobs. What is committed stays; `opd resume` goes on with it."""
    run = _open(run_dir)
    found = queue.cancel(run)
    typer.echo(f"cancelled {', '.join(found)}" if found else "no job of this run waits or runs")


def resume_run(run_dir: RunArgument) -> None:
    """Submit the job of a run again, from its newest commit and with its own run.yaml and script."""
    run = _open(run_dir)
    job = resume(run)
    if (notice := _notice_of(run)) is not None:
        typer.echo(notice)
    print_submitted(run, job)
