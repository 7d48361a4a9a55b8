"""Where the models and prompt files that a recipe names lie on this machine.

A recipe names a model as Hugging Face does, `Qwen/Qwen3-4B-Base`, and a prompt file by a relative path; neither is a
place. The first of these that exists is taken:

    model   ROOT/Qwen/Qwen3-4B-Base and ROOT/Qwen3-4B-Base, for every ROOT of OPD_MODELS (separated by colons)
            the Hugging Face cache: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub, revision `main`
    file    ROOT/PATH, for every ROOT of OPD_DATA

An existing path of one's own, absolute or relative to the recipe or the current directory, wins over all of them.
Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from opd_megatron.config.schema import Recipe

MODELS_VARIABLE = "OPD_MODELS"
DATA_VARIABLE = "OPD_DATA"
# `name` or `organisation/name`: what the hub allows, and no path with more parts.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_model_name(text: str) -> bool:
    """Whether this can be a model's name rather than a path."""
    return bool(_MODEL_NAME.fullmatch(text)) and not text.endswith("/.")


def _roots(variable: str, environment: Mapping[str, str]) -> list[Path]:
    return [Path(os.path.expanduser(r)) for r in environment.get(variable, "").split(":") if r]


def _hub_cache(environment: Mapping[str, str]) -> Path:
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(cache))
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.path.expanduser(home)) / "hub"


def model_places(name: str, environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Directories in which a model of this name is looked for, in order."""
    short = name.rpartition("/")[2]
    places: list[Path] = []
    for root in _roots(MODELS_VARIABLE, environment):
        places += [root / name] if name == short else [root / name, root / short]
    if name != short:
        entry = _hub_cache(environment) / f"models--{name.replace('/', '--')}"
        reference = entry / "refs" / "main"
        revision = reference.read_text().strip() if reference.is_file() else "main"
        places.append(entry / "snapshots" / revision)
    return tuple(places)


def data_places(path: str, environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Files in which prompts of this relative path are looked for, in order."""
    return tuple(root / path for root in _roots(DATA_VARIABLE, environment))


def map_paths(recipe: Recipe, model: Callable[[str], str], file: Callable[[str], str]) -> Recipe:
    """The recipe with `model` done to every model's path and `file` to every prompt file's."""
    return dataclasses.replace(
        recipe,
        student=dataclasses.replace(recipe.student, path=model(recipe.student.path)),
        teachers={
            name: dataclasses.replace(teacher, path=model(teacher.path))
            for name, teacher in recipe.teachers.items()
        },
        data=dataclasses.replace(
            recipe.data, train=file(recipe.data.train), heldout=file(recipe.data.heldout)
        ),
    )


def locate(recipe: Recipe, environment: Mapping[str, str] | None = None) -> Recipe:
    """Replace names of models and relative paths of prompt files by where they lie; what is nowhere stays as it is."""
    variables = os.environ if environment is None else environment

    def model(name: str) -> str:
        if not is_model_name(name) or Path(name).is_dir():
            return name
        return next((str(p) for p in model_places(name, variables) if p.is_dir()), name)

    def file(path: str) -> str:
        if not path or os.path.isabs(path) or Path(path).is_file():
            return path
        return next((str(p) for p in data_places(path, variables) if p.is_file()), path)

    return map_paths(recipe, model, file)


def how_to_get_model(name: str, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """(where a missing model was looked for, what to do), for an error message."""
    variables = os.environ if environment is None else environment
    looked = ", ".join(map(str, model_places(name, variables)))
    unset = "" if variables.get(MODELS_VARIABLE) else f"; {MODELS_VARIABLE} is not set"
    fetch = f"run `hf download {name}`, or " if "/" in name else ""
    return (
        f"not on this machine (looked in: {looked or 'nowhere'}{unset})",
        f"{fetch}set {MODELS_VARIABLE} to a folder that holds it, or give its directory",
    )
