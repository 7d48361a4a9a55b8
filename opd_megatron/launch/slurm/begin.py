"""The start of an attempt, on the job's first node: take the run directory, and make what the nodes will share.

    python -m opd_megatron.launch.slurm.begin --run-dir DIR --job ID     prints the number of the attempt

*Fence.* Attempt N+1 exists from an exclusive mkdir on, which is atomic on every file system, locks or not. A job that
was taken for dead and still runs finds the later attempt before its next commit and stops (controller/stop.py). The
batch script has asked Slurm before whether the job that owned the directory is alive.

*Progress.* An attempt that begins at the same commit as the one before it brought nothing. After `max_idle_attempts` of
these in a row another try is refused with exit code 78, so that a run that always dies does not requeue for ever.
Excused are attempts that were pre-empted, and by `opd resume` all earlier ones. Not one that the time limit ended: it
had all the time there is, and the next would end the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from pathlib import Path

from opd_megatron.atomic import read_json, write_bytes, write_json
from opd_megatron.config.locations import locate
from opd_megatron.config.run_yaml import read_run_mapping, read_run_yaml, write_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, OpdError, RoleDied
from opd_megatron.launch import leftovers, lock
from opd_megatron.launch.preflight import check_inputs, check_learner
from opd_megatron.launch.slurm import queue
from opd_megatron.launch.slurm.table import read_table
from opd_megatron.observe.environment import describe_environment
from opd_megatron.rundir import AttemptDir, RunDir
from opd_megatron.serving.keys import new_keys, write_keys

_OWNER = "owner.json"
# What the batch script writes into `stop_requested` when the time limit is near; agents leave the file empty.
_TIME_LIMIT = "USR1"


def newest_commit(run: RunDir) -> str:
    """Name of the newest commit, not verified here; empty when there is none."""
    found = sorted(path.name for path in run.checkpoints.glob("step_*"))
    return found[-1] if found else ""


def idle_attempts(run: RunDir) -> int:
    """Attempts in a row, up to now, that began where the newest commit still is."""
    commit, idle = newest_commit(run), 0
    for number in reversed(run.attempts()):
        path = run.attempt(number).root / _OWNER
        if not path.exists() or read_json(path)["commit"] != commit:
            break
        if read_json(path).get("excused"):
            continue
        idle += 1
    return idle


def excuse(attempt: AttemptDir) -> None:
    """That the attempt brought nothing does not count; one that no job claimed never does."""
    path = attempt.root / _OWNER
    if path.exists():
        write_json(path, {**read_json(path), "excused": True})


def was_preempted(attempt: AttemptDir) -> bool:
    """Whether it was asked to stop before its time was over."""
    asked = attempt.stop_requested
    return asked.exists() and asked.read_text().strip() != _TIME_LIMIT


def claim(run: RunDir, job: str) -> AttemptDir:
    """Take the next attempt number.

    Raises:
        ConfigError: another job took it in this moment.
    """
    for number in run.attempts():
        if was_preempted(run.attempt(number)):
            excuse(run.attempt(number))
    attempt = run.attempt((run.attempts() or [0])[-1] + 1)
    attempt.root.parent.mkdir(exist_ok=True)
    try:
        attempt.root.mkdir(mode=0o700)
    except FileExistsError as error:
        raise ConfigError.of(
            "run directory", str(run.root), "another job has just taken it", "leave it to that job"
        ) from error
    write_json(attempt.root / _OWNER, {"job": job, "commit": newest_commit(run)})
    write_bytes(run.slurm.owner, f"{job}\n".encode())
    # Submitted by hand, it is known from here on.
    if job not in queue.jobs_of(run):
        queue.add_job(run, job)
    return attempt


def located(run: RunDir) -> Recipe:
    """The run's recipe. What the submitter had by name alone is looked for on this node and frozen into run.yaml.

    Raises:
        ConfigError: as `read_run_yaml`.
    """
    recipe = read_run_yaml(run.run_yaml)
    found = locate(recipe)
    if found != recipe:
        content = read_run_mapping(run.run_yaml)
        write_run_yaml(run.run_yaml, found, Path(content["recipe_file"]), content["overrides"])
    return found


def begin(run: RunDir, job: str) -> int:
    """Everything that an attempt's nodes expect to find.

    Returns:
        the number of the attempt.

    Raises:
        ConfigError: inputs that do not fit, a directory that another job took, or too many attempts without progress.
    """
    frozen = read_table(run.slurm.table)
    limit = frozen.max_idle_attempts
    if idle_attempts(run) >= limit:
        raise ConfigError.of(
            "cluster.max_idle_attempts",
            limit,
            f"so many attempts in a row made no new commit; the last is in {run.logs / 'latest'}",
            f"mend the cause, then opd resume {run.root}, which counts from zero",
        )
    recipe = located(run)
    check_learner(recipe)
    check_inputs(recipe)
    earlier = run.attempts()
    attempt = claim(run, job)
    for number in earlier:
        leftovers.remove(run, number)
    leftovers.remove_temporaries(run)
    for folder in (attempt.mailbox, attempt.batches, attempt.nodes):
        folder.mkdir(mode=0o700)
    attempt.identity.write_text(uuid.uuid4().hex)
    attempt.grace.write_text(f"{frozen.grace_s}\n")
    write_keys(attempt.keys, new_keys())
    write_json(run.environment, describe_environment())
    logs = run.logs / f"attempt_{attempt.number}"
    for role in frozen.table.roles:
        (logs / role.name).mkdir(parents=True, exist_ok=True)
    temporary = run.logs / f".latest.{os.getpid()}"
    temporary.symlink_to(logs.name)
    temporary.replace(run.logs / "latest")
    return attempt.number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="opd_megatron.launch.slurm.begin")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--job", required=True)
    arguments = parser.parse_args(argv)
    run = RunDir(arguments.run_dir)
    try:
        # Against a run of `opd run` in the same directory, as far as the file system knows locks.
        with lock.hold(run.lock):
            print(begin(run, arguments.job), flush=True)
    except OpdError as error:
        print(f"opd: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        print(f"opd: {RoleDied(str(error))}", file=sys.stderr, flush=True)
        return RoleDied.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
