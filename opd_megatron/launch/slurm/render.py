"""From the role table to the batch script: a jinja2 template (`slurm/job.sh.j2`) and shell quoting.

Every value that is not a number or a name checked before goes through `shlex.quote`, so no text of a recipe, a site or
a path can become shell. `#SBATCH` lines, where that quoting does not hold, take checked characters only (site.py).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from opd_megatron.errors import ConfigError
from opd_megatron.launch.slurm.site import Site, check_sbatch_text, check_variable, slurm_folder
from opd_megatron.launch.slurm.table import CONTROLLER, Role, RoleTable, segment_of
from opd_megatron.rundir import RunDir

_TEMPLATE = "job.sh.j2"
_IMAGE_PYTHON = "python3"
# Slurm's own patterns (%j) would be filled into a path.
_NOT_IN_PATHS = ("%",)


@dataclass(frozen=True)
class Step:
    """One `srun`: what the template prints for a role, or for all nodes."""

    name: str
    nodes: int
    first_node: int
    devices: int
    srun: str
    command: str


def quote(text: str) -> str:
    """A shell word that expands to exactly `text`.

    Raises:
        ConfigError: it holds a NUL or a lone surrogate, which no shell word can.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError.of(
            "text for the shell", text, "is not Unicode text", "retype it"
        ) from error
    if "\0" in text:
        raise ConfigError.of("text for the shell", text, "holds a NUL byte", "take it out")
    return shlex.quote(text)


def words(argv: Sequence[str]) -> str:
    return " ".join(quote(word) for word in argv)


def check_run_dir(run: RunDir) -> None:
    """
    Raises:
        ConfigError: the path can not stand in an `#SBATCH` line.
    """
    check_sbatch_text("--run-dir", str(run.root))
    for text in _NOT_IN_PATHS:
        if text in str(run.root):
            raise ConfigError.of(
                "--run-dir", str(run.root), f"Slurm gives {text} a meaning", "rename it"
            )


def sbatch_lines(site: Site, table: RoleTable, run: RunDir, job_name: str) -> list[str]:
    """What stands after `#SBATCH`, without the `#SBATCH`; "hetjob" separates components."""
    check_sbatch_text("job name", job_name)
    check_run_dir(run)
    shared = [
        f"--{name}={value}"
        for name, value in (
            ("account", site.account),
            ("partition", site.partition),
            ("qos", site.qos),
            ("reservation", site.reservation),
            ("constraint", site.constraint),
            ("exclude", site.exclude),
            ("mem", site.memory),
        )
        if value
    ]
    if site.exclusive:
        shared.append("--exclusive")
    if site.cpus_per_node:
        shared.append(f"--cpus-per-task={site.cpus_per_node}")
    lines = [
        f"--job-name={job_name}",
        f"--output={run.slurm.log}",
        "--open-mode=append",
        f"--time={site.time}",
        *([f"--comment={site.comment}"] if site.comment else []),
        *([f"--signal=B:USR1@{site.grace_s}"] if site.grace_s else []),
        "--requeue" if site.requeue else "--no-requeue",
        *site.sbatch_options,
    ]
    for number, component in enumerate(table.components):
        if number:
            lines.append("hetjob")
        lines += [f"--nodes={component.nodes}", "--ntasks-per-node=1", *shared, *gpu_flag(site)]
        segment = segment_of(site, component.nodes)
        if segment:
            lines.append(f"--segment={segment}")
    return lines


def gpu_flag(site: Site) -> list[str]:
    if site.gpu_flag == "none":
        return []
    name = "--gpus-per-node=" if site.gpu_flag == "gpus-per-node" else "--gres=gpu:"
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    return [f"{name}{kind}{site.devices_per_node}"]


def _container(site: Site, run: RunDir, variables: Sequence[str]) -> list[str]:
    """Pyxis options. The run directory is mounted under its own path: script and agents both use it."""
    if not site.container_image:
        return []
    mounts = [f"{run.root}:{run.root}", *site.container_mounts]
    options = [
        f"--container-image={site.container_image}",
        f"--container-mounts={','.join(mounts)}",
        "--no-container-mount-home",
        # Kernels are compiled into caches below the home directory, and enroot's default is read-only.
        "--container-writable",
    ]
    return [*options, f"--container-env={','.join(variables)}"] if variables else options


def _srun(site: Site, table: RoleTable, run: RunDir, role: Role, output: str = "") -> str:
    """Options of the step of a role: one agent a node, and the role ends where one of them fails."""
    where = _where(table, role.component, role.first_node, role.nodes)
    ends = ["--kill-on-bad-exit=1", "--unbuffered"]
    return words([*where, *ends, *_shared(site, run, bool(role.devices))]) + output


def _where(table: RoleTable, component: int, first_node: int, nodes: int) -> list[str]:
    """One task a node."""
    place = f"--het-group={component}" if len(table.components) > 1 else f"--relative={first_node}"
    return ["--overlap", place, f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]


def _shared(site: Site, run: RunDir, gpus: bool) -> list[str]:
    """What every step gets, whatever it runs."""
    return [
        "--input=none",
        # One task a node starts all its processes: a site that binds tasks would put them on one core.
        "--cpu-bind=none",
        *([f"--mem={site.memory}"] if site.memory else []),
        *(gpu_flag(site) if gpus else []),
        *site.srun_options,
        *_container(site, run, sorted(site.environment)),
    ]


def calls_of(site: Site, table: RoleTable, run: RunDir) -> list[Step]:
    """One step over all nodes (of a component), in which each says that it is there. A folder follows its command."""
    # A file, since the shared file system is one of the things that a node may lack.
    command = words(["sh", "-c", ': >"$0/$SLURMD_NODENAME"'])
    # Whatever the site's default: who is late or fails must not end the others.
    ends = ["--kill-on-bad-exit=0", "--wait=0"]
    found: list[Step] = []
    for number, component in enumerate(table.components):
        where = _where(table, number, 0, component.nodes)
        srun = words([*where, *ends, *_shared(site, run, gpus=False)])
        found.append(Step("call", component.nodes, 0, 0, srun, command))
    return found


def python_of(site: Site) -> str:
    """The job's interpreter: the site's, the image's, or this one, which all nodes see on a shared file system."""
    return site.python or (_IMAGE_PYTHON if site.container_image else sys.executable)


def steps_of(site: Site, table: RoleTable, run: RunDir) -> tuple[list[Step], Step]:
    """What every role runs, and what begins an attempt."""
    python = python_of(site)
    found: list[Step] = []
    for role in table.roles:
        argv = [
            *(python, "-m", "opd_megatron.launch.slurm.agent"),
            *("--run-dir", str(run.root), "--role", role.name),
        ]
        # The controller's output is the job's.
        log = f' --output="$run/logs/attempt_$attempt/{role.name}/agent-%t.log" --open-mode=append'
        srun = _srun(site, table, run, role, log if role.name != CONTROLLER else "")
        found.append(Step(role.name, role.nodes, role.first_node, role.devices, srun, words(argv)))
    controller = table.role(CONTROLLER)
    argv = [python, "-m", "opd_megatron.launch.slurm.begin", "--run-dir", str(run.root)]
    srun = _srun(site, table, run, controller)
    return found, Step("begin", 1, 0, 0, srun, words(argv))


def _nodelists(table: RoleTable) -> str:
    """Shell words: Slurm's variables that hold the job's nodes."""
    if len(table.components) == 1:
        return '"$SLURM_JOB_NODELIST"'
    return " ".join(f'"$SLURM_JOB_NODELIST_HET_GROUP_{i}"' for i in range(len(table.components)))


def render(site: Site, table: RoleTable, run: RunDir, job_name: str) -> str:
    """The whole batch script.

    Raises:
        ConfigError: a value that can not stand where it would.
    """
    for name, value in site.environment.items():
        check_variable(name)
        quote(value)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(slurm_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    steps, begin = steps_of(site, table, run)
    return environment.get_template(_TEMPLATE).render(
        q=quote,
        job_name=job_name,
        run=str(run.root),
        sbatch=sbatch_lines(site, table, run, job_name),
        setup=site.setup,
        environment=sorted(site.environment.items()),
        roles=steps,
        begin=begin,
        calls=calls_of(site, table, run),
        node_start_timeout_s=site.node_start_timeout_s,
        nodelists=_nodelists(table),
        requeue=site.requeue,
        exclude=site.exclude,
        server_restarts=site.server_restarts,
        max_idle_attempts=site.max_idle_attempts,
    )


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
