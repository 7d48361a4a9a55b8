"""`opd submit`: a recipe as a Slurm job. Runs on a login node, without torch."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from opd_megatron.cli.jobs import print_submitted
from opd_megatron.cli.recipes import Overrides, RecipeName, describe
from opd_megatron.cli.runs import default_run_dir
from opd_megatron.config.locations import locate
from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.config.rules import check
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.offline import check_offline
from opd_megatron.launch.preflight import check_inputs, check_learner
from opd_megatron.launch.slurm import grace, nemo, queue
from opd_megatron.launch.slurm.mounts import check_mounts
from opd_megatron.launch.slurm.preview import processes
from opd_megatron.launch.slurm.render import write_script
from opd_megatron.launch.slurm.site import PREFIX, Site, load_site
from opd_megatron.launch.slurm.source import check_source
from opd_megatron.launch.slurm.submit import Job, plan, write_job, written
from opd_megatron.launch.slurm.table import RoleTable
from opd_megatron.rundir import RunDir

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
    recipe, path = _checked_recipe(name, own, site, offline)
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
    print_submitted(run, job_id)


def _checked_recipe(
    name: str, overrides: list[str], site: Site, offline: bool
) -> tuple[Recipe, Path]:
    """The recipe and its file, checked as far as this machine can.

    Raises:
        ConfigError, DataError: as the checks of `opd validate`.
    """
    recipe, path = resolve_recipe(name, overrides, here=False)
    if not site.ssh_host:
        recipe = locate(recipe, {**os.environ, **site.environment})
    check(recipe)
    if offline:
        for line in check_offline(recipe):
            typer.echo(f"# not checked here: {line}")
    elif not site.ssh_host:  # else models and data are on the other side, where the job checks them
        check_learner(recipe, here=False)
        check_inputs(recipe)
    return recipe, path


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
