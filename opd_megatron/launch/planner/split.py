"""The division of a recipe's GPUs between learner, rollout and teacher that gives the shortest step.

Every division is tried: whole servers and whole data-parallel replicas, all GPUs used as far as they divide, each role
within the GPU's memory. Layouts inside a role (tensor, pipeline, context parallel) stay as the recipe has them. With
several served teachers their servers grow together, in the recipe's proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opd_megatron.config.overrides import change
from opd_megatron.config.recipe_facts import devices_of, gpus_by_role
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.planner.hardware import Device
from opd_megatron.launch.planner.memory import check_fits, learner_memory
from opd_megatron.launch.planner.stages import (
    Lengths,
    Models,
    StepTime,
    num_microbatches,
    step_time,
)


@dataclass(frozen=True)
class Split:
    """GPUs by role, the settings that make them, and the step that they give."""

    gpus: dict[str, int]
    settings: dict[str, int]
    time: StepTime


def _with_learner_and_teachers(
    recipe: Recipe, total: int, quantum: int
) -> Iterator[dict[str, int]]:
    learner = recipe.learner
    replica = learner.world_size // learner.data_parallel
    served = recipe.served_teachers
    unit = sum(devices_of(t.server) for t in served.values())
    smallest = min((t.server.num_servers for t in served.values()), default=1)
    steps = range(1, total // max(1, unit // smallest) + 1) if served else range(1, 2)
    for replicas in range(1, total // replica + 1):
        if replicas > recipe.batch.samples_per_step or replicas * replica % quantum:
            continue
        for step in steps:
            servers = {n: t.server.num_servers * step // smallest for n, t in served.items()}
            teacher = sum(servers[n] * t.server.tensor_parallel for n, t in served.items())
            tp = recipe.rollout.server.tensor_parallel
            rollout = (total - replicas * replica - teacher) // tp
            if rollout < 1 or teacher % quantum:
                continue
            yield {
                "learner.data_parallel": replicas,
                "rollout.server.num_servers": rollout,
                **{f"teachers.{n}.server.num_servers": number for n, number in servers.items()},
            }


def best_split(
    recipe: Recipe, models: Models, device: Device, lengths: Lengths, *, whole_nodes: bool
) -> Split:
    """The fastest division of as many GPUs as the recipe takes.

    Args:
        whole_nodes: no node is shared by two roles.
    """
    total = sum(gpus_by_role(recipe).values())
    quantum = device.gpus_per_node if whole_nodes and total % device.gpus_per_node == 0 else 1
    inside = {n: models.teachers[n] for n in recipe.in_process_teachers}
    best: Split | None = None
    for settings in _with_learner_and_teachers(recipe, total, quantum):
        other = change(recipe, settings)
        time = step_time(other, models, device, lengths)
        if best is not None and time.step >= best.time.step:
            continue
        micro = num_microbatches(other, other.batch.samples_per_step, lengths)
        try:
            for memory in learner_memory(other, models.student, inside, micro):
                check_fits(memory, device)
        except ConfigError:
            continue  # this division does not fit; the recipe's own was checked before
        best = Split(gpus_by_role(other), settings, time)
    if best is None:  # nothing divides: the recipe's own division is the one there is
        best = Split(gpus_by_role(recipe), {}, step_time(recipe, models, device, lengths))
    return best
