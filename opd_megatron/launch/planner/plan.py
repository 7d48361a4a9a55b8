"""A recipe's plan: memory by role, seconds by stage, the balanced split, GPU-hours, and what is not modelled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from opd_megatron.config.recipe_facts import gpus_by_role
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.offline import model_facts
from opd_megatron.launch.planner.hardware import CPU, CPU_PARAMETERS, Device
from opd_megatron.launch.planner.memory import (
    RoleMemory,
    check_fits,
    check_server,
    learner_memory,
    server_memory,
)
from opd_megatron.launch.planner.split import Split, best_split
from opd_megatron.launch.planner.stages import (
    Lengths,
    Models,
    StepTime,
    num_microbatches,
    step_time,
)
from opd_megatron.launch.planner.work import parameters
from opd_megatron.megatron.architecture import check_layout

# Mean tokens of a prompt of a mathematics problem with its chat template, where nothing else is said: the published
# logs of the reference run have 94 to 100.
DEFAULT_PROMPT_TOKENS = 128

NOT_MODELLED_ON_CPU = (
    "the machine: seconds are those of the one that docs/planner.md measured, with two cores for all processes",
    "processes that share cores: more ranks or servers on one machine are no faster than the formulas say one is",
    "whether host memory is enough: processes of a node share it",
)
NOT_MODELLED = (
    "a spread of response lengths: all responses are as long as --response-tokens says",
    "prefill of prompts, the cost of grading, HTTP and JSON, waiting for a slow server",
    "with overlap.mode=async, rollouts of several steps at once on a server, and prompts read again after an update",
    "communication of the learner's ranks beyond what the published training speed holds, and saves",
    "host memory, start-up, checks before the first step, failures",
)


@dataclass(frozen=True)
class Plan:
    """What `opd estimate` prints. `prompts`: rows of the training file, 0 where they are not known."""

    device: Device
    gpus: dict[str, int]
    lengths: Lengths
    memory: tuple[RoleMemory, ...]
    time: StepTime
    balanced: Split
    samples: int
    prompts: int
    steps: int
    prompts_per_step: int

    @property
    def num_gpus(self) -> int:
        return sum(self.gpus.values())

    @property
    def tokens(self) -> int:
        """Of a step, prompts included."""
        return self.samples * self.lengths.total

    def gpu_hours(self, steps: float) -> float:
        return steps * self.time.step * self.num_gpus / 3600

    @property
    def steps_per_epoch(self) -> float:
        return self.prompts / self.prompts_per_step


def models_of(recipe: Recipe) -> Models:
    """Sizes of a recipe's models, from their files or from the table of published ones.

    Raises:
        ConfigError: a model in neither.
    """
    teachers = {
        name: model_facts(teacher.path, f"teachers.{name}.path").architecture
        for name, teacher in recipe.teachers.items()
    }
    return Models(model_facts(recipe.student.path, "student.path").architecture, teachers)


def count_prompts(recipe: Recipe) -> int:
    """Rows of the training file; 0 where it is not here."""
    path = Path(recipe.data.train)
    if not path.is_file():
        return 0
    if path.suffix == ".parquet":
        from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]

        return int(cast(Any, parquet).ParquetFile(path).metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def check_device(recipe: Recipe, models: Models, device: Device) -> None:
    """
    Raises:
        ConfigError: a recipe for GPUs on the CPU's row of the table, or models that its constants do not hold for.
    """
    if not device.is_cpu:
        return
    if recipe.device != CPU:
        raise ConfigError.of(
            "--hardware", CPU, f"the recipe is for device={recipe.device}", "name its GPU"
        )
    largest = max(parameters(arch) for arch in (models.student, *models.teachers.values()))
    if largest > CPU_PARAMETERS:
        raise ConfigError.of(
            "--hardware",
            CPU,
            f"its seconds are those of models as small as the demo's, and one here has {largest:,} parameters",
            "measure a run of two steps, or name a GPU",
        )


def make_plan(
    recipe: Recipe, device: Device, lengths: Lengths, *, whole_nodes: bool = True
) -> Plan:
    """
    Raises:
        ConfigError: a layout that does not divide, a precision that the device does not train in, or a role that
            does not fit into a GPU, with the term that is too large.
    """
    models = models_of(recipe)
    check_device(recipe, models, device)
    check_layout(models.student, recipe.learner)
    if lengths.total > recipe.batch.tokens_per_microbatch:
        raise ConfigError.of(
            "--response-tokens",
            lengths.response,
            f"with prompts of {lengths.prompt} tokens exceeds batch.tokens_per_microbatch="
            f"{recipe.batch.tokens_per_microbatch}",
            "lower it",
        )
    time = step_time(recipe, models, device, lengths)
    micro = num_microbatches(recipe, recipe.batch.samples_per_step, lengths)
    inside = {name: models.teachers[name] for name in recipe.in_process_teachers}
    memory = learner_memory(recipe, models.student, inside, micro)
    longest = recipe.data.max_prompt_tokens + recipe.max_response_tokens
    if recipe.uses_servers:
        server = recipe.rollout.server
        check_server("rollout", "rollout.server", models.student, server, device, longest)
        memory.append(server_memory("rollout", models.student, server, device, time.running))
        for name, teacher in recipe.served_teachers.items():
            role, key, arch = f"teacher-{name}", f"teachers.{name}.server", models.teachers[name]
            check_server(role, key, arch, teacher.server, device, longest)
            memory.append(server_memory(role, arch, teacher.server, device, 0))
    for role in memory:
        check_fits(role, device)
    return Plan(
        device=device,
        gpus=gpus_by_role(recipe),
        lengths=lengths,
        memory=tuple(memory),
        time=time,
        balanced=best_split(recipe, models, device, lengths, whole_nodes=whole_nodes),
        samples=recipe.batch.samples_per_step,
        prompts=count_prompts(recipe),
        steps=recipe.steps,
        prompts_per_step=recipe.batch.prompts_per_step,
    )
