"""What an agent knows: the run, its role, and where it stands among the role's nodes."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.launch.slurm import nodes
from opd_megatron.launch.slurm.table import Frozen, Role, read_table
from opd_megatron.rundir import AttemptDir, RunDir


@dataclass(frozen=True)
class Place:
    """`index` counts the nodes of the role."""

    run: RunDir
    attempt: AttemptDir
    recipe: Recipe
    frozen: Frozen
    role: Role
    index: int
    address: str

    @property
    def alone(self) -> bool:
        return self.frozen.table.nodes == 1


def open_place(run: RunDir, number: int, name: str, index: int) -> Place:
    frozen = read_table(run.slurm.table)
    alone = frozen.table.nodes == 1
    return Place(
        run=run,
        attempt=run.attempt(number),
        recipe=read_run_yaml(run.run_yaml),
        frozen=frozen,
        role=frozen.table.role(name),
        index=index,
        address=nodes.own_address(frozen.interface, alone),
    )
