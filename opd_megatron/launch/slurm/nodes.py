"""How the nodes of a job find each other: one small file a node in `attempts/N/nodes/`, on the shared file system.

    rollout-1.json    {"agent": id, "host": name, "address": "10.0.0.7", "ports": [20111], "servers": [{"name", "url"}]}
    learner-0.json    its port is the learner's rendezvous store

A node writes its file before it starts anything; who needs an address waits for the file. Nothing listens on more
than the one address written there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import psutil

from opd_megatron.atomic import read_json, write_json
from opd_megatron.errors import ConfigError, RoleDied

POLL_S = 0.2


@dataclass(frozen=True)
class NodeFile:
    """What a node says of itself. `agent` is the membership id of its processes (launch/members.py)."""

    agent: str
    host: str
    address: str
    ports: tuple[int, ...]
    servers: tuple[dict[str, str], ...] = ()


def node_name() -> str:
    """The name by which Slurm knows this node, or the machine's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_address(interface: str, alone: bool) -> str:
    """The IPv4 address that servers on this node bind.

    Args:
        interface: name of a network interface, or empty for the address of the node's name.
        alone: the whole job is on one node; then loopback is right.

    Raises:
        ConfigError: no such interface, no IPv4 address on it, or a name that other nodes would resolve to themselves.
    """
    if alone and not interface:
        return "127.0.0.1"
    if interface:
        found = psutil.net_if_addrs().get(interface, [])
        addresses = [a.address for a in found if a.family == socket.AF_INET]
        if not addresses:
            known = ", ".join(sorted(psutil.net_if_addrs()))
            raise ConfigError.of(
                "cluster.interface",
                interface,
                f"has no IPv4 address on {node_name()}",
                f"known: {known}",
            )
        return addresses[0]
    name = node_name()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError.of(
            "cluster.interface", "", f"{name} does not resolve: {error}", "name a network interface"
        ) from error
    if address.startswith("127."):
        raise ConfigError.of(
            "cluster.interface",
            "",
            f"{name} resolves to loopback ({address}), where no other node can reach it",
            "name a network interface, such as ib0 or eth0",
        )
    return address


def path_of(folder: Path, role: str, index: int) -> Path:
    return folder / f"{role}-{index}.json"


def write_node(folder: Path, role: str, index: int, node: NodeFile) -> None:
    write_json(path_of(folder, role, index), asdict(node), durable=False)


def read_node(path: Path) -> NodeFile | None:
    """What a node wrote; None when it has not yet."""
    if not path.exists():
        return None
    content = cast(dict[str, Any], read_json(path))
    return NodeFile(
        content["agent"],
        content["host"],
        content["address"],
        tuple(content["ports"]),
        tuple(content["servers"]),
    )


def wait_for_nodes(
    paths: Sequence[Path], seconds: float, given_up: Callable[[], bool]
) -> list[NodeFile]:
    """Wait until every node has written its file.

    Raises:
        RoleDied: one had not in time, or the attempt ended meanwhile.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = [read_node(path) for path in paths]
        if None not in found:
            return [node for node in found if node is not None]
        missing = [p.stem for p, node in zip(paths, found, strict=True) if node is None]
        if given_up():
            raise RoleDied(f"the attempt ended before {', '.join(missing)} had started")
        if time.monotonic() > deadline:
            raise RoleDied(f"{', '.join(missing)}: not started after {seconds:.0f} s; see its log")
        time.sleep(POLL_S)
