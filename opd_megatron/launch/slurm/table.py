"""The role table: who runs where. The one place from which script, dry run, status and node agents take it.

    role             nodes  first node  devices a node  first device
    controller           1           0               0             0
    learner              4           0               4             0
    rollout              2           4               4             0
    teacher-main         1           6               2             0
    teacher-code         1           6               2             2      shares the node

Nodes are numbered within the allocation. The learner comes first, because the batch script and the controller are on
the first node. A role smaller than a node shares one where the site allows it. A server never spans nodes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from opd_megatron.atomic import read_json, write_json
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.roles import servers_by_role
from opd_megatron.launch.slurm.site import Site

CONTROLLER, LEARNER = "controller", "learner"
_ROLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Role:
    """One row.

    Args:
        first_node: in the allocation; in a heterogeneous job, of the component.
        component: of a heterogeneous job; 0 otherwise.
        devices: used on each node.
        first_device: on its nodes.
        processes: servers on each node (the last may have fewer), or learner ranks on each.
        total: servers or ranks over all nodes.
    """

    name: str
    nodes: int
    first_node: int
    component: int
    devices: int
    first_device: int
    processes: int
    total: int

    def on_node(self, index: int) -> range:
        """Numbers of the servers or ranks on the role's node `index`."""
        return range(index * self.processes, min(self.total, (index + 1) * self.processes))


@dataclass(frozen=True)
class Component:
    """Nodes asked for together: the whole job, or one part of a heterogeneous one."""

    nodes: int


@dataclass(frozen=True)
class RoleTable:
    roles: tuple[Role, ...]
    components: tuple[Component, ...]

    @property
    def nodes(self) -> int:
        return sum(component.nodes for component in self.components)

    def role(self, name: str) -> Role:
        return next(role for role in self.roles if role.name == name)


def _shape(name: str, total: int, devices_each: int, per_node: int) -> tuple[int, int, int]:
    """Nodes, processes a node and devices a node of `total` processes that take `devices_each`."""
    if devices_each > per_node:
        raise ConfigError.of(
            f"{name}: tensor_parallel",
            devices_each,
            f"a server can not span nodes of {per_node} devices (cluster.devices_per_node)",
            "lower its tensor_parallel",
        )
    fit = per_node // devices_each
    nodes = math.ceil(total / fit)
    processes = min(total, fit)
    if name == LEARNER and total > fit and total % fit:
        raise ConfigError.of(
            "learner world size",
            total,
            f"does not divide into nodes of {per_node} devices (cluster.devices_per_node)",
            f"use a multiple of {per_node}",
        )
    return nodes, processes, processes * devices_each


def role_table(recipe: Recipe, site: Site) -> RoleTable:
    """Place the roles of a recipe on the nodes of a site.

    Raises:
        ConfigError: a server larger than a node, a learner that leaves a node half used, or a teacher whose name
            can not name a role.
    """
    wanted = {LEARNER: (recipe.learner.world_size, 1)} | {
        name: (config.num_servers, config.tensor_parallel)
        for name, (_, config) in servers_by_role(recipe).items()
        if recipe.uses_servers
    }
    rows: list[Role] = []
    components: list[Component] = []
    next_node, free_from = 0, site.devices_per_node
    for number, (name, (total, each)) in enumerate(wanted.items()):
        if not _ROLE_NAME.fullmatch(name):
            raise ConfigError.of(
                "teachers", name, "a name has letters, digits and _.- only", "rename it"
            )
        nodes, processes, devices = _shape(name, total, each, site.devices_per_node)
        shares = site.share_nodes and nodes == 1 and free_from + devices <= site.devices_per_node
        first_node, first_device = (next_node - 1, free_from) if shares else (next_node, 0)
        next_node, free_from = first_node + nodes, first_device + devices
        if nodes > 1:
            free_from = site.devices_per_node
        component = 0
        if site.placement == "het":
            component, first_node = number, 0
            components.append(Component(nodes))
        rows.append(
            Role(name, nodes, first_node, component, devices, first_device, processes, total)
        )
    if site.placement == "slices":
        components.append(Component(next_node))
    controller = Role(CONTROLLER, 1, 0, 0, 0, 0, 1, 1)
    return RoleTable((controller, *rows), tuple(components))


def segment_of(site: Site, nodes: int) -> int:
    """Size of a block of nodes that must lie in one NVLink domain; 0 leaves the option out.

    `auto`: the whole job where a domain holds it, else the largest divisor of the number of nodes that a domain holds.
    """
    if site.segment == "none" or (site.segment == "auto" and site.domain_nodes == 0):
        return 0
    if site.segment != "auto":
        size = int(site.segment)
        if size < 1 or nodes % size:
            raise ConfigError.of(
                "cluster.segment", size, f"does not divide the job's {nodes} nodes", "use auto"
            )
        return size
    return max(size for size in range(1, min(nodes, site.domain_nodes) + 1) if nodes % size == 0)


@dataclass(frozen=True)
class Frozen:
    """What the nodes know of the job and its site. Holds paths of secrets, no secret."""

    table: RoleTable
    interface: str
    devices_per_numa_node: int
    node_check: str
    secrets: dict[str, str]
    max_idle_attempts: int
    grace_s: int
    exclude: str = ""


_OF_THE_SITE = (
    "interface", "devices_per_numa_node", "node_check", "secrets", "max_idle_attempts", "grace_s",
    "exclude",
)  # fmt: skip


def freeze(table: RoleTable, site: Site) -> Frozen:
    return Frozen(table, **{key: getattr(site, key) for key in _OF_THE_SITE})


def write_table(path: Path, table: RoleTable, site: Site) -> None:
    """Write `roles.json`, for the nodes."""
    write_json(
        path,
        {
            "roles": [asdict(role) for role in table.roles],
            "components": [asdict(component) for component in table.components],
            "site": {key: getattr(site, key) for key in _OF_THE_SITE},
        },
    )


def read_table(path: Path) -> Frozen:
    """
    Raises:
        ConfigError: the run directory holds no job.
    """
    if not path.is_file():
        raise ConfigError.of(
            "run directory", str(path.parents[1]), "holds no Slurm job", "submit it with opd submit"
        )
    content = cast(dict[str, Any], read_json(path))
    roles = cast(Sequence[dict[str, Any]], content["roles"])
    table = RoleTable(
        tuple(Role(**role) for role in roles),
        tuple(Component(**component) for component in content["components"]),
    )
    return Frozen(table, **content["site"])
