"""What a recipe is at a glance: models, GPUs by role, hardware, precision; and the grammar of recipe names.

    <student>_from_<teacher>_<N>gpu_<hardware>_<precision>[_<variant>]
    <student>_sft_<N>gpu_<hardware>_<precision>[_<variant>]

e.g. `qwen3_4b_base_from_qwen3_32b_32gpu_gb200_mxfp8`. Models are written in small letters with `_` for `-` and `.`. The
hardware stands in the name alone: a recipe holds no cluster, and the same numbers run wherever they fit. Everything
else is read from the recipe, and a test holds the two together. Recipes for a CPU (`demo...`) have no such name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from opd_megatron.config.schema import Recipe, ServerConfig

_NAME = re.compile(
    r"(?P<student>\w+?)_(from_(?P<teacher>\w+?)|sft)_(?P<gpus>\d+)gpu_(?P<hardware>[a-z]+\d+)"
    r"_(?P<precision>bf16|fp8|mxfp8)(_(?P<variant>\w+))?"
)
_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)[Bb](?![A-Za-z])")
_LEARNER = "learner"


@dataclass(frozen=True)
class NameParts:
    """A recipe's name taken apart; teacher and variant are empty where there is none."""

    student: str
    teacher: str
    gpus: int
    hardware: str
    precision: str
    variant: str


def parse_name(name: str) -> NameParts | None:
    """The parts of a name of the grammar; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    parts = {key: value or "" for key, value in found.groupdict().items()}
    return NameParts(**{**parts, "gpus": int(parts["gpus"])})  # pyright: ignore[reportArgumentType]


def word_of(model: str) -> str:
    """A model as recipe names write it: `Qwen/Qwen2.5-7B-Instruct` -> `qwen2_5_7b_instruct`."""
    return re.sub(r"[-.]", "_", model.rstrip("/").rpartition("/")[2].lower())


def size_of(model: str) -> str:
    """The size in a model's name, `32B`; empty where it has none."""
    found = _SIZE.findall(model.rstrip("/").rpartition("/")[2])
    return f"{found[-1]}B" if found else ""


@dataclass(frozen=True)
class RecipeFacts:
    """Of one recipe. `gpus`: by role, `learner`, `rollout`, `teacher-NAME`; on a CPU these are processes."""

    name: str
    summary: str
    student: str
    teachers: tuple[str, ...]
    gpus: dict[str, int]
    hardware: str
    precision: str

    @property
    def num_gpus(self) -> int:
        return sum(self.gpus.values())


def devices_of(server: ServerConfig) -> int:
    """GPUs of all servers of a role."""
    return server.num_servers * server.tensor_parallel


def gpus_by_role(recipe: Recipe) -> dict[str, int]:
    """GPUs that a recipe takes, by role; no role shares a GPU with another."""
    found = {_LEARNER: recipe.learner.world_size}
    if recipe.uses_servers:
        found["rollout"] = devices_of(recipe.rollout.server)
        for name, teacher in recipe.served_teachers.items():
            found[f"teacher-{name}"] = devices_of(teacher.server)
    return found


def precision_of(recipe: Recipe) -> str:
    """As recipe names write it: MXFP8 is FP8 with its own word."""
    learner = recipe.learner
    is_mx = learner.precision == "fp8" and learner.fp8_recipe == "mxfp8"
    return "mxfp8" if is_mx else learner.precision


def facts_of(recipe: Recipe) -> RecipeFacts:
    """Read a recipe's facts; the hardware from its name, `cpu` or `cuda` where that says none."""
    parts = parse_name(recipe.name)
    return RecipeFacts(
        name=recipe.name,
        summary=recipe.summary,
        student=recipe.student.path.rstrip("/").rpartition("/")[2],
        teachers=tuple(t.path.rstrip("/").rpartition("/")[2] for t in recipe.teachers.values()),
        gpus=gpus_by_role(recipe),
        hardware=parts.hardware if parts and recipe.device == "cuda" else recipe.device,
        precision=precision_of(recipe),
    )
