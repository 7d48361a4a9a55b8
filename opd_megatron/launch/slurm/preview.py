"""What a job's agents will start, for the dry run: the very commands, with words for what only a running job knows.

`NODE_ADDRESS` is the node's address, `AGENT_PID` the agent's process; ports, which are chosen at start, are shown as 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from opd_megatron.launch.role_command import RoleCommand
from opd_megatron.launch.roles import Server, servers_by_role
from opd_megatron.launch.slurm import commands
from opd_megatron.launch.slurm.place import Place
from opd_megatron.launch.slurm.render import python_of, words
from opd_megatron.launch.slurm.submit import Job
from opd_megatron.launch.slurm.table import CONTROLLER, LEARNER, Role, freeze
from opd_megatron.serving.command import LOOPBACK

ADDRESS, AGENT_PID = "NODE_ADDRESS", "AGENT_PID"


@dataclass(frozen=True)
class Preview:
    """One process of a role on one of its nodes; secrets, and what the site sets, are not in `environment`."""

    name: str
    node: str
    environment: dict[str, str]
    argv: list[str]

    def line(self) -> str:
        """As a line of shell."""
        variables = " ".join(f"{k}={words([v])}" for k, v in sorted(self.environment.items()))
        return f"{self.name} on {self.node}: {variables} {words(self.argv)}"


def _where(job: Job, role: Role, index: int) -> str:
    number = role.first_node + index
    return (
        f"component {role.component} node {index}"
        if len(job.table.components) > 1
        else f"node {number}"
    )


def _of_node(place: Place) -> list[RoleCommand]:
    role = place.role
    if role.name == CONTROLLER:
        return [commands.controller(place)]
    if role.name == LEARNER:
        return [commands.learner_command(place, place.address, 0)]
    model_path, config = servers_by_role(place.recipe)[role.name]
    placed = [
        Server(f"{role.name}-{number}", "", model_path, config, 0, place.address)
        for number in role.on_node(place.index)
    ]
    return commands.server_commands(place, placed)


def _words(job: Job, argv: list[str]) -> list[str]:
    """The job's Python for this one, and no process id of the dry run."""
    found = [python_of(job.site) if word == sys.executable else word for word in argv]
    if "--parent-pid" in found:
        found[found.index("--parent-pid") + 1] = AGENT_PID
    return found


def processes(job: Job) -> Iterator[Preview]:
    """Every process of the first attempt, in the order of the role table."""
    run = job.run
    frozen = freeze(job.table, job.site)
    address = LOOPBACK if job.table.nodes == 1 and not job.site.interface else ADDRESS
    place = Place(run, run.attempt(1), job.recipe, frozen, job.table.role(CONTROLLER), 0, address)
    for role in job.table.roles:
        for index in range(role.nodes):
            for command in _of_node(replace(place, role=role, index=index)):
                yield Preview(
                    command.name,
                    _where(job, role, index),
                    dict(command.environment),
                    _words(job, list(command.argv)),
                )
