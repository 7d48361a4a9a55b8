"""A site file: what one cluster wants of a job, and nothing of what a run learns.

`slurm/clusters/NAME.yaml`, or a path. Every key has a type and a default here; an unknown key is refused.
`cluster.key=value` on the command line changes one. What goes into a `#SBATCH` line is limited to characters that
need no quoting there, since sbatch's own rules for quotes are not those of a shell.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_megatron.errors import ConfigError, did_you_mean

PREFIX = "cluster."
_PACKAGE = Path(__file__).resolve().parents[2]
_SBATCH_SAFE = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]-]*")
# The operators of a constraint mean nothing to sbatch's own parser of lines.
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]&|()*!-]*")
_SBATCH_OPTION = re.compile(r"--([a-z][a-z-]*)(=.+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
# Slurm's way to say whole nodes with all their memory.
_ALL_MEMORY = "0"
# `--signal` holds the seconds in 16 bits.
_LONGEST_NOTICE_S = 65535
_SIGNAL_EARLY_S = 60
# Names that would be read as a value rather than carry one; NeMo-Run writes a missing value so.
_NOT_VALUES = {"none", "null"}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One cluster. Empty text leaves an option out.

    Args:
        devices_per_node: GPUs of a node; on a CPU cluster, learner ranks and servers that one node takes.
        domain_nodes: nodes of an NVLink domain; 0 where there is none.
        segment: `auto` keeps the job within as few domains as its size allows; a number; `none` for a Slurm older
            than 23.11, which refuses the option.
        share_nodes: roles smaller than a node may stand on one.
        placement: `slices` of one allocation, or `het`, a heterogeneous job with a component a role.
        gpu_flag: how GPUs are asked for: `--gpus-per-node`, `--gres=gpu:` or not at all.
        gpu_type: the type in front of the number, where a site wants one, e.g. `h100`.
        exclusive: whole nodes. `false` needs `cpus_per_node`, and `memory` other than 0, which is all of a node.
        cpus_per_node: asked for on every node; 0: not asked for.
        devices_per_numa_node: GPUs that hang on one NUMA node, to which their processes are bound; 0: no binding.
        interface: network interface whose address the servers bind; empty: the address of the node's name.
        node_start_timeout_s: how long a node may take for its first step, in which a container is fetched.
        grace_s: how long before the time limit the run is told to commit.
        max_idle_attempts: attempts in a row without a new commit after which the job gives up.
        server_restarts: how often a dead server role is started again within an attempt.
        node_check: a shell command run on each node before its role; a node where it fails is left out from then on.
        environment: variables of every role.
        secrets: variable name -> file that holds its value; read on the node, at the start of each role.
        sbatch_options: what no other key says, e.g. `--licenses=scratch`.
        setup: lines of shell at the head of the batch script, e.g. `module load slurm`.
    """

    summary: str = ""
    account: str = ""
    partition: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    exclude: str = ""
    time: str = "04:00:00"
    comment: str = ""
    run_root: str = "runs"
    devices_per_node: int = 8
    gpu_flag: str = "gpus-per-node"
    gpu_type: str = ""
    domain_nodes: int = 0
    segment: str = "none"
    exclusive: bool = True
    cpus_per_node: int = 0
    memory: str = _ALL_MEMORY
    share_nodes: bool = True
    placement: str = "slices"
    devices_per_numa_node: int = 0
    interface: str = ""
    python: str = ""
    container_image: str = ""
    container_mounts: list[str] = field(default_factory=list[str])
    sbatch_options: list[str] = field(default_factory=list[str])
    srun_options: list[str] = field(default_factory=list[str])
    node_start_timeout_s: int = 900
    grace_s: int = 300
    max_idle_attempts: int = 3
    server_restarts: int = 0
    requeue: bool = True
    node_check: str = ""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    secrets: dict[str, str] = field(default_factory=dict[str, str])
    setup: list[str] = field(default_factory=list[str])
    ssh_host: str = ""
    ssh_port: int = 22
    ssh_user: str = ""
    ssh_identity: str = ""
    ssh_job_dir: str = ""


# What a key of a type must be, and how to write it.
_TYPES: dict[Any, tuple[str, str]] = {
    str: ("must be text", "write one word, in quotes if need be"),
    int: ("must be a whole number", "e.g. 8"),
    bool: ("must be true or false", "write one of them"),
    list[str]: ("must be a list", "write [FIRST, SECOND]"),
    dict[str, str]: (
        "must map names to text",
        "write KEY.NAME=VALUE, or `NAME: VALUE` lines under it",
    ),
}
_CHOICES = {
    "gpu_flag": ("gpus-per-node", "gres", "none"),
    "placement": ("slices", "het"),
}
_LOWEST = {
    "devices_per_node": 1,
    "cpus_per_node": 0,
    "domain_nodes": 0,
    "devices_per_numa_node": 0,
    "grace_s": 0,
    "node_start_timeout_s": 1,
    "max_idle_attempts": 1,
    "server_restarts": 0,
}
_IN_SBATCH_LINES = (
    "account", "partition", "qos", "reservation", "exclude", "comment", "memory", "segment", "gpu_type",
)  # fmt: skip
# Options of sbatch that keys of a site or the job script decide.
_OWN_OPTIONS = {
    "account", "partition", "qos", "reservation", "constraint", "exclude", "time", "comment", "mem", "exclusive",
    "segment", "gpus-per-node", "gres", "cpus-per-task", "nodes", "ntasks", "ntasks-per-node", "job-name", "output",
    "error", "open-mode", "signal", "requeue", "no-requeue", "dependency", "array", "export", "hold",
}  # fmt: skip


def slurm_folder() -> Path:
    """`slurm/`: the copy inside an installed wheel, else that of the source tree."""
    inside = _PACKAGE / "_slurm"
    return inside if inside.is_dir() else _PACKAGE.parent / "slurm"


def find_sites() -> dict[str, Path]:
    """Site name -> file."""
    return {p.stem: p for p in sorted((slurm_folder() / "clusters").glob("*.yaml"))}


def load_site(name: str, overrides: Sequence[str] = ()) -> Site:
    """A site by name or by the path of a file of one's own, with `cluster.key=value` overrides.

    Raises:
        ConfigError: no such site, an unknown key, a value of the wrong type or against a rule.
    """
    known = find_sites()
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError.of("--cluster", name, "no such file", "give the path of a site file")
    elif name in known:
        path = known[name]
    else:
        raise ConfigError(
            f"--cluster={name!r}: no such site{did_you_mean(name, known)}; known: {', '.join(known)}, "
            f"or give the path of a .yaml file of your own"
        )
    try:
        # Every scalar as it is written: YAML 1.1 takes 12:00:00 for a number in base 60, and `yes` for true.
        loaded = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: not a mapping of site keys; copy one from slurm/clusters/")
    site = _merge(cast(dict[str, Any], loaded), overrides, str(path))
    check_site(site)
    return site


def _merge(values: dict[str, Any], overrides: Sequence[str], source: str) -> Site:
    """The file's values, then those of the command line; each is converted to the type of its key."""
    merged = cast(DictConfig, OmegaConf.structured(Site))
    OmegaConf.set_readonly(merged, False)
    for key, value in values.items():
        _set(merged, f"{source}: ", key, value)
    for override in overrides:
        key, equals, text = override.removeprefix(PREFIX).partition("=")
        if not equals:
            raise ConfigError.of("override", f"{PREFIX}{key}", "has no value", "write key=value")
        _set(merged, PREFIX, key, _as_list(key, text) if text.startswith("[") else text)
    return cast(Site, OmegaConf.to_object(merged))


def _as_list(key: str, text: str) -> Any:
    """`[first, second]` of the command line; text where the key is one of text."""
    if typing.get_type_hints(Site).get(key) != list[str]:
        return text
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError.of(f"{PREFIX}{key}", text, *_TYPES[list[str]]) from error


def _set(merged: DictConfig, where: str, key: str, value: Any) -> None:
    """
    Args:
        where: what stands in front of the key in a message.
    """
    names, root = [f.name for f in fields(Site)], key.split(".")[0]
    if root not in names:
        raise ConfigError(
            f"{where}{key}: no such site key{did_you_mean(root, names)}; known: {', '.join(names)}"
        )
    try:
        OmegaConf.update(merged, key, value, force_add=True)
    except OmegaConfBaseException as error:
        wanted = typing.get_type_hints(Site)[root]
        rule, fix = _TYPES.get(wanted, _TYPES[str])
        raise ConfigError.of(f"{where}{key}", value, rule, fix) from error


def check_site(site: Site) -> None:
    """Rules on single keys.

    Raises:
        ConfigError: key, value, rule, fix.
    """
    for key, choices in _CHOICES.items():
        if (value := getattr(site, key)) not in choices:
            raise _wrong(key, value, f"must be one of {', '.join(choices)}", "choose one of them")
    for key, low in _LOWEST.items():
        if (value := getattr(site, key)) < low:
            raise _wrong(key, value, f"must be at least {low}", "raise it")
    for key in _IN_SBATCH_LINES:
        check_sbatch_text(f"{PREFIX}{key}", str(getattr(site, key)))
    check_sbatch_text(f"{PREFIX}constraint", site.constraint, _CONSTRAINT)
    for option in site.sbatch_options:
        _check_sbatch_option(option)
    if not site.exclusive and not site.cpus_per_node:
        raise _wrong(
            "exclusive",
            False,
            "on shared nodes Slurm gives one CPU a node unless more are asked for",
            "set cluster.cpus_per_node (and cluster.memory)",
        )
    if not _TIME.fullmatch(site.time):
        raise _wrong("time", site.time, "not a Slurm time", "write D-HH:MM:SS, HH:MM:SS or minutes")
    if site.grace_s > _LONGEST_NOTICE_S:
        raise _wrong(
            "grace_s", site.grace_s, f"Slurm takes {_LONGEST_NOTICE_S} at most", "lower it"
        )
    if site.grace_s and site.grace_s + _SIGNAL_EARLY_S >= limit_s(site):
        raise _wrong(
            "grace_s",
            site.grace_s,
            f"the run would be told to end as soon as it begins: cluster.time={site.time}, and Slurm may signal "
            f"{_SIGNAL_EARLY_S} s early",
            "lower it, or raise cluster.time",
        )
    if site.segment not in ("auto", "none") and not site.segment.isdigit():
        raise _wrong("segment", site.segment, "must be auto, none or a number", "e.g. auto")
    if site.placement == "het" and site.share_nodes:
        raise _wrong(
            "share_nodes", True, "roles of a heterogeneous job stand alone", "set it to false"
        )
    for name in [*site.environment, *site.secrets]:
        check_variable(name)
    for mount in site.container_mounts:
        if "," in mount or not mount or any(c.isspace() for c in mount):
            raise _wrong("container_mounts", mount, "one `FROM:TO[:FLAGS]` each", "split it")
    both = sorted(set(site.environment) & set(site.secrets))
    if both:
        raise _wrong("secrets", both, "are in `environment` too", "leave them only in `secrets`")


def limit_s(site: Site) -> int:
    """Seconds of the time limit. Slurm reads one number as minutes, two as MM:SS, and after days as hours first."""
    days, dash, rest = site.time.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _wrong(key: str, value: object, rule: str, fix: str) -> ConfigError:
    return ConfigError.of(f"{PREFIX}{key}", value, rule, fix)


def _check_sbatch_option(option: str) -> None:
    """
    Raises:
        ConfigError: not one option, or one that another key decides.
    """
    found = _SBATCH_OPTION.fullmatch(option)
    if found is None or found[1] in _OWN_OPTIONS:
        raise _wrong(
            "sbatch_options",
            option,
            "must be `--name` or `--name=value`, of an option that no other key decides",
            "see the keys of opd_megatron/launch/slurm/site.py",
        )
    check_sbatch_text(f"{PREFIX}sbatch_options", option)


def check_sbatch_text(key: str, value: str, safe: re.Pattern[str] = _SBATCH_SAFE) -> None:
    """
    Raises:
        ConfigError: the value needs quoting in a `#SBATCH` line, or is the word for no value.
    """
    if not safe.fullmatch(value):
        raise ConfigError.of(
            key,
            value,
            "stands in an #SBATCH line, where only letters, digits and _.,:/@%+=[]- are safe",
            "rename it",
        )
    if value.lower() in _NOT_VALUES and key != f"{PREFIX}segment":
        raise ConfigError.of(key, value, "is the word for no value", "leave it empty")


def check_variable(name: str) -> None:
    """
    Raises:
        ConfigError: not a name a shell accepts for a variable, or one that Slurm owns.
    """
    if not _VARIABLE.fullmatch(name) or name.startswith(("SLURM_", "SBATCH_")):
        raise ConfigError.of(
            f"{PREFIX}environment", name, "not a variable name of its own", "rename it"
        )
