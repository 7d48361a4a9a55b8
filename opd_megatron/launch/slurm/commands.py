"""The command lines of a role's processes on one node, and the endpoint file that the controller reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from opd_megatron.launch.ports import PortReservations
from opd_megatron.launch.role_command import RoleCommand
from opd_megatron.launch.roles import (
    Server,
    controller_role,
    learner_role,
    server_role,
    servers_by_role,
)
from opd_megatron.launch.roles import write_endpoints as write_endpoint_file
from opd_megatron.launch.slurm import nodes
from opd_megatron.launch.slurm.place import Place
from opd_megatron.launch.slurm.table import LEARNER


def visible_devices(place: Place, local: int, each: int) -> str:
    """`CUDA_VISIBLE_DEVICES` of the process `local` (counted on this node), which takes `each` devices.

    Slurm numbers the GPUs it gave to the step in the same variable; without it they count from 0.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = given.split(",") if given else [str(n) for n in range(10**3)]
    first = place.role.first_device + local * each
    return ",".join(names[first : first + each])


def numa_prefix(place: Place, local: int, each: int) -> list[str]:
    """`numactl` in front of a server whose GPUs hang on one NUMA node."""
    per_node = place.frozen.devices_per_numa_node
    first = place.role.first_device + local * each
    if per_node == 0 or first // per_node != (first + each - 1) // per_node:
        return []
    numa = first // per_node
    return ["numactl", f"--cpunodebind={numa}", f"--membind={numa}"]


def nccl_environment(place: Place) -> dict[str, str]:
    """NCCL's own connections go over the interface that the site names, unless its `environment` names another."""
    name = place.frozen.interface
    if place.recipe.device != "cuda" or not name or "NCCL_SOCKET_IFNAME" in os.environ:
        return {}
    return {"NCCL_SOCKET_IFNAME": name}


def servers(place: Place, identity: str, ports: PortReservations) -> list[RoleCommand]:
    """Reserve ports, say where this node's servers will be, and return what to start."""
    role, recipe, attempt = place.role, place.recipe, place.attempt
    model_path, config = servers_by_role(recipe)[role.name]
    path = nodes.path_of(attempt.nodes, role.name, place.index)
    before = nodes.read_node(path)
    placed: list[Server] = []
    for local, number in enumerate(role.on_node(place.index)):
        # A role that is started again comes back where the controller knows it.
        port = ports.reserve() if before is None else ports.reserve_again(before.ports[local])
        name, url = f"{role.name}-{number}", f"http://{place.address}:{port}"
        placed.append(Server(name, url, model_path, config, port, place.address))
    said = nodes.NodeFile(
        identity,
        nodes.node_name(),
        place.address,
        tuple(server.port for server in placed),
        tuple({"name": server.role, "url": server.url} for server in placed),
    )
    nodes.write_node(attempt.nodes, role.name, place.index, said)
    return server_commands(place, placed)


def server_commands(place: Place, placed: Sequence[Server]) -> list[RoleCommand]:
    """What starts the servers of this node, each with its own devices."""
    started: list[RoleCommand] = []
    for local, server in enumerate(placed):
        offset = place.index * place.role.processes + local
        command = server_role(server, place.recipe, place.run, place.attempt.number, offset)
        environment = {**command.environment, **nccl_environment(place)}
        each = server.config.tensor_parallel
        prefix: list[str] = []
        if place.recipe.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices(place, local, each)
            prefix = numa_prefix(place, local, each)
        started.append(replace(command, argv=[*prefix, *command.argv], environment=environment))
    return started


def learner(place: Place, identity: str, ports: PortReservations) -> RoleCommand:
    """This node's torchrun; the first node offers the store at which the others meet."""
    role, attempt = place.role, place.attempt
    first = nodes.path_of(attempt.nodes, LEARNER, 0)
    port = ports.reserve() if place.index == 0 and role.nodes > 1 else 0
    said = nodes.NodeFile(identity, nodes.node_name(), place.address, (port,))
    nodes.write_node(attempt.nodes, LEARNER, place.index, said)
    limit = place.recipe.learner.start_timeout_s
    (head,) = nodes.wait_for_nodes([first], limit, attempt.is_unwanted)
    return learner_command(place, head.address, head.ports[0])


def learner_command(place: Place, address: str, port: int) -> RoleCommand:
    """This node's torchrun.

    Args:
        address, port: of the first node's store; of no account where the learner has one node.
    """
    role, attempt = place.role, place.attempt
    log = place.run.role_logs(attempt.number, LEARNER) / f"learner-{place.index}.log"
    command = learner_role(
        place.recipe, place.run.run_yaml, attempt.mailbox, log, ranks=len(role.on_node(place.index))
    )
    argv = list(command.argv)
    environment = {**command.environment, **nccl_environment(place)}
    position = argv.index("-m", argv.index("-m") + 1)
    added: list[str] = []
    if role.nodes > 1:
        added += ["--opd-nodes", f"{role.nodes},{place.index},{address},{port}"]
        del environment["GLOO_SOCKET_IFNAME"]
        if place.frozen.interface:
            environment["GLOO_SOCKET_IFNAME"] = place.frozen.interface
    if place.recipe.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices(place, 0, role.devices)
        if place.frozen.devices_per_numa_node:
            added += ["--numa-binding", "node"]
    return replace(
        command, argv=[*argv[:position], *added, *argv[position:]], environment=environment
    )


def controller(place: Place) -> RoleCommand:
    return controller_role(place.run, place.attempt.number, "opd_megatron.controller.main")


def write_all_endpoints(place: Place) -> None:
    """Wait until every server's node has said where its servers are, and tell the controller.

    Raises:
        RoleDied: a node did not start in time.
    """
    here = {role.name: role for role in place.frozen.table.roles}
    placed: dict[str, list[Server]] = {}
    for name, (model_path, config) in servers_by_role(place.recipe).items():
        count = here[name].nodes if name in here else 0
        paths = [nodes.path_of(place.attempt.nodes, name, i) for i in range(count)]
        found = nodes.wait_for_nodes(paths, config.start_timeout_s, place.attempt.is_unwanted)
        placed[name] = [
            Server(s["name"], s["url"], model_path, config, 0)
            for node in found
            for s in node.servers
        ]
    write_endpoint_file(place.attempt.endpoints, placed)
