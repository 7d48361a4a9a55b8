"""`opd submit`, `status`, `logs`, `cancel`, `resume`: a run as a Slurm job. Runs on a login node, without torch."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from opd_megatron.cli.recipes import Overrides, RecipeName, describe
from opd_megatron.cli.runs import default_run_dir
from opd_megatron.config.locations import locate
from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.config.rules import check
from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, ServerError
from opd_megatron.launch.offline import check_offline
from opd_megatron.launch.preflight import check_inputs, check_learner
from opd_megatron.launch.slurm import grace, nemo, queue
from opd_megatron.launch.slurm.mounts import check_mounts
from opd_megatron.launch.slurm.preview import processes
from opd_megatron.launch.slurm.render import write_script
from opd_megatron.launch.slurm.site import PREFIX, Site, load_site
from opd_megatron.launch.slurm.source import check_source
from opd_megatron.launch.slurm.submit import Job, plan, resume, write_job, written
from opd_megatron.launch.slurm.table import RoleTable, read_table
from opd_megatron.rundir import RunDir

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
_FOLLOW_S = 0.5
# How long a log that is followed may be silent before Slurm is asked whether the run is over.
_ASK_S = 5.0
VIA_NEMO, VIA_SBATCH = "nemo-run", "sbatch"


def submit(
    name: RecipeName,
    overrides: Overrides = None,
    cluster: Annotated[
        str, typer.Option("--cluster", help="A site of slurm/clusters/, or a .yaml file.")
    ] = "",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Default: the site's run_root/RECIPE-TIME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print script and commands, write nothing.")
    ] = False,
    render: Annotated[
        Path | None,
        typer.Option(
            "--render", help="Fill the run directory and write the script here; submit nothing."
        ),
    ] = None,
    via: Annotated[
        str, typer.Option("--via", help="nemo-run, or sbatch for a site without NeMo-Run.")
    ] = VIA_NEMO,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Submit a changed checkout; keep its difference.")
    ] = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Models and prompts are not here; the job finds them."),
    ] = False,
) -> None:
    """Submit a recipe to a Slurm cluster. Overrides: KEY=VALUE of the recipe, cluster.KEY=VALUE of the site."""
    if not cluster:
        raise ConfigError.of(
            "--cluster", "", "names no site", "e.g. --cluster generic, or a .yaml file"
        )
    if via not in (VIA_NEMO, VIA_SBATCH):
        raise ConfigError.of("--via", via, f"must be {VIA_NEMO} or {VIA_SBATCH}", f"say {VIA_NEMO}")
    own = [o for o in overrides or [] if not o.startswith(PREFIX)]
    site = load_site(cluster, [o for o in overrides or [] if o.startswith(PREFIX)])
    _refuse_site_keys(own)
    recipe, path = resolve_recipe(name, own, here=False)
    if not site.ssh_host:
        recipe = locate(recipe, {**os.environ, **site.environment})
    check(recipe)
    if offline:
        for line in check_offline(recipe):
            typer.echo(f"# not checked here: {line}")
    elif not site.ssh_host:  # else models and data are on the other side, where the job checks them
        check_learner(recipe, here=False)
        check_inputs(recipe)
    source = check_source(allow_dirty or dry_run)
    run = _run_dir(run_dir, site, recipe)
    check_mounts(recipe, site, run)
    job = plan(recipe, path, own, site, run)
    through_nemo = via == VIA_NEMO and render is None
    if through_nemo:
        nemo.check(site)
    elif site.ssh_host:
        raise ConfigError.of(
            "cluster.ssh_host",
            site.ssh_host,
            "NeMo-Run carries jobs over SSH",
            f"say --via {VIA_NEMO}",
        )
    if dry_run:
        _print_dry_run(job, through_nemo)
        return
    if through_nemo:
        typer.echo("submitting through NeMo-Run ...", err=True)
    if site.ssh_host:
        job_id = nemo.submit_over_ssh(job, source)
    elif render is not None:
        write_job(job, source)
        write_script(render, job.script)
        typer.echo(grace.predicted(recipe, site))
        typer.echo(f"submit it with: sbatch {shlex.quote(str(render))}")
        return
    else:
        with written(job, source):
            job_id = nemo.submit(job) if through_nemo else queue.submit_script(run.slurm.script)
        queue.add_job(run, job_id)
    for line in [*describe(recipe), grace.predicted(recipe, site)]:
        typer.echo(line)
    _print_submitted(run, job_id)


def _run_dir(said: Path | None, site: Site, recipe: Recipe) -> RunDir:
    """Where the run will be.

    Raises:
        ConfigError: on another machine, and not a whole path: its home and working directory are not these here.
    """
    named = default_run_dir(recipe.name).name
    if not site.ssh_host:
        return RunDir((said or Path(site.run_root).expanduser() / named).resolve())
    key, root = ("--run-dir", said) if said else (f"{PREFIX}run_root", Path(site.run_root))
    if not root.is_absolute():
        raise ConfigError.of(
            key, str(root), "with ssh_host must be a whole path", "begin it with /"
        )
    return RunDir(said or root / named)


def _refuse_site_keys(overrides: list[str]) -> None:
    """
    Raises:
        ConfigError: an override of the recipe is a key of the site without its prefix.
    """
    of_recipes = {field.name for field in dataclasses.fields(Recipe)}
    of_sites = {field.name for field in dataclasses.fields(Site)} - of_recipes
    for override in overrides:
        if override.partition("=")[0].split(".")[0] in of_sites:
            raise ConfigError.of(
                "override", override, "a key of the site", f"write {PREFIX}{override}"
            )


def _print_submitted(run: RunDir, job: str) -> None:
    typer.echo(f"job {job}")
    typer.echo(f"run directory {run.root}")
    typer.echo(f"tail -F {shlex.quote(str(run.slurm.log))}")


def table_lines(table: RoleTable) -> list[str]:
    """The role table as text."""
    lines = [f"{'role':<20} {'nodes':>5} {'first':>5} {'devices':>7} {'from':>4} {'processes':>9}"]
    for role in table.roles:
        where = (
            f"{role.component}:{role.first_node}" if len(table.components) > 1 else role.first_node
        )
        lines.append(
            f"{role.name:<20} {role.nodes:>5} {where:>5} {role.devices:>7} {role.first_device:>4} {role.total:>9}"
        )
    return lines


def _print_dry_run(job: Job, through_nemo: bool) -> None:
    """To stdout, unwrapped, so that it can be piped: comments first, then the script that would run."""
    if through_nemo:
        typer.echo("asking NeMo-Run for its script ...", err=True)
    submitted = nemo.dry_run(job) if through_nemo else ""
    facts = [*describe(job.recipe), grace.predicted(job.recipe, job.site)]
    notes = [*facts, f"run directory {job.run.root}", *table_lines(job.table)]
    for note in notes:
        typer.echo(f"# {note}")
    typer.echo(
        "# ---- what the agents of the job script start: address and ports (0) are chosen at start"
    )
    for process in processes(job):
        typer.echo(f"# {process.line()}")
    if through_nemo:
        typer.echo("# ---- what NeMo-Run submits; it hands over to the job script below")
        typer.echo(submitted)
        typer.echo("# ---- the job script, " + str(job.run.slurm.script))
    typer.echo(job.script, nl=False)


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
    _print_submitted(run, job)
