"""`opd submit`: from a checked recipe and a site to a job.

RUN/run.yaml            the resolved recipe: what the job runs, whatever happens to the recipe file
RUN/slurm/roles.json    the role table
RUN/slurm/job.sh        the batch script: `sbatch RUN/slurm/job.sh` is the same job without NeMo-Run
RUN/slurm/source.json   the commit it was submitted from
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.run_yaml import write_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, OpdError
from opd_megatron.launch.slurm import queue
from opd_megatron.launch.slurm.begin import excuse
from opd_megatron.launch.slurm.render import check_run_dir, render, write_script
from opd_megatron.launch.slurm.site import Site
from opd_megatron.launch.slurm.source import record_source
from opd_megatron.launch.slurm.table import RoleTable, read_table, role_table, write_table
from opd_megatron.rundir import RunDir, make_folder


@dataclass(frozen=True)
class Job:
    """Everything about a job before it is submitted."""

    recipe: Recipe
    recipe_file: Path
    overrides: tuple[str, ...]
    site: Site
    table: RoleTable
    run: RunDir
    script: str


def plan(
    recipe: Recipe, recipe_file: Path, overrides: Sequence[str], site: Site, run: RunDir
) -> Job:
    """Place the roles and render the script; writes nothing.

    Raises:
        ConfigError: as `role_table` and `render`.
    """
    table = role_table(recipe, site)
    script = render(site, table, run, job_name(recipe))
    return Job(recipe, recipe_file, tuple(overrides), site, table, run, script)


def job_name(recipe: Recipe) -> str:
    return f"opd-{recipe.name}"


def write_job(job: Job, source: dict[str, object], into: RunDir | None = None) -> None:
    """Fill the run directory.

    Args:
        into: write here instead, to be carried there.

    Raises:
        ConfigError: it holds a run already.
    """
    run = into or job.run
    check_run_dir(job.run)
    if run.run_yaml.exists():
        raise ConfigError.of(
            "--run-dir",
            str(run.root),
            "holds a run already",
            f"go on with it: opd resume {run.root}",
        )
    make_folder(run.root, "--run-dir")
    run.slurm.root.mkdir(exist_ok=True)
    write_run_yaml(run.run_yaml, job.recipe, job.recipe_file, job.overrides)
    write_table(run.slurm.table, job.table, job.site)
    record_source(run, source)
    write_script(run.slurm.script, job.script)


@contextmanager
def written(job: Job, source: dict[str, object]) -> Generator[None]:
    """Fill the run directory for the block that submits; when it is refused, take that out again.

    Raises:
        ConfigError: as `write_job`.
    """
    was_there = job.run.root.exists()
    write_job(job, source)
    try:
        yield
    except OpdError:
        job.run.run_yaml.unlink()
        shutil.rmtree(job.run.slurm.root)
        if not was_there:
            job.run.root.rmdir()
        raise


def resume(run: RunDir) -> str:
    """Submit the job of a run again; returns its id.

    Raises:
        ConfigError: no job there, the run is done, or a job of it waits or runs.
    """
    if not run.slurm.script.is_file():
        raise ConfigError.of(
            "RUN", str(run.root), "holds no Slurm job", "submit it with opd submit"
        )
    if run.done.exists():
        raise ConfigError.of("RUN", str(run.root), "the run is done", "see its report.html")
    living = queue.living_job(run)
    if living is not None:
        raise ConfigError.of(
            "RUN",
            str(run.root),
            f"job {living.job} is {living.state}",
            "wait for it, or opd cancel it",
        )
    for path in (run.slurm.cancelled, run.slurm.root / "begin_failures"):
        path.unlink(missing_ok=True)
    # Somebody has looked: what the attempts up to now failed at is taken as mended.
    for number in run.attempts():
        excuse(run.attempt(number))
    job = queue.submit_script(run.slurm.script, _without_bad_nodes(run))
    queue.add_job(run, job)
    return job


def _without_bad_nodes(run: RunDir) -> list[str]:
    """Options of sbatch. The command line wins over the script's own `--exclude`, so both are said."""
    path = run.slurm.bad_nodes
    if not path.exists():
        return []
    of_site = read_table(run.slurm.table).exclude
    bad = sorted(set(path.read_text().split()))
    return [f"--exclude={','.join([*bad, of_site] if of_site else bad)}"] if bad else []
