"""`opd recipes list|show|diff|cp`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
import yaml

from opd_megatron.cli.objectives import describe_loss
from opd_megatron.config.overrides import changed_leaves, to_mapping
from opd_megatron.config.recipe_facts import RecipeFacts, facts_of, size_of
from opd_megatron.config.recipes import (
    about_recipe,
    find_recipes,
    load_recipe,
    locate_recipe,
    resolve_recipe,
)
from opd_megatron.config.schema import Recipe, TeacherConfig
from opd_megatron.errors import ConfigError

app = typer.Typer(help="The recipes that come with the project.", no_args_is_help=True)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe name or path to a .py file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Overrides, e.g. optimizer.lr=1e-4."),
]


def _is_wanted(
    facts: RecipeFacts, student: str, teacher_size: str, gpus: int, hardware: str
) -> bool:
    sizes = [size_of(teacher) for teacher in facts.teachers]
    return (
        student.lower() in facts.student.lower()
        and (not teacher_size or teacher_size.upper() in sizes)
        and (not gpus or (facts.hardware != "cpu" and facts.num_gpus <= gpus))
        and (not hardware or facts.hardware == hardware.lower())
    )


@app.command("list")
def list_recipes(
    student: Annotated[str, typer.Option(help="Part of the student's name, e.g. 4B-Base.")] = "",
    teacher_size: Annotated[str, typer.Option(help="Size of a teacher, e.g. 32B.")] = "",
    gpus: Annotated[int, typer.Option(help="At most so many GPUs.", min=0)] = 0,
    hardware: Annotated[str, typer.Option(help="gb200, h100 or cpu.")] = "",
) -> None:
    """One line per recipe: devices, precision, what it is."""
    every = [facts_of(load_recipe(str(path))[0]) for path in find_recipes().values()]
    chosen = [f for f in every if _is_wanted(f, student, teacher_size, gpus, hardware)]
    if not chosen:
        raise ConfigError(
            f"no recipe of {len(every)} fits; students: {', '.join(_words(f.student for f in every))}; "
            f"teachers: {', '.join(_words(size_of(t) for f in every for t in f.teachers))}; "
            f"hardware: {', '.join(_words(f.hardware for f in every))}"
        )
    width = max(len(facts.name) for facts in chosen)
    for facts in chosen:
        where = "cpu" if facts.hardware == "cpu" else f"{facts.num_gpus}x {facts.hardware}"
        typer.echo(f"{facts.name:<{width}}  {where:<9} {facts.precision:<6} {facts.summary}")


def _words(texts: Iterable[str]) -> list[str]:
    return sorted({text for text in texts if text})


@app.command("show")
def show(
    name: RecipeName,
    overrides: Overrides = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what differs from the defaults.")
    ] = False,
) -> None:
    """The fully resolved recipe as YAML; as comments what its file says of it, and derived numbers."""
    recipe, path = resolve_recipe(name, overrides or [])
    summary, *derived = describe(recipe)
    about = about_recipe(path).splitlines()
    if overrides and about:
        about = ["its file says, without these overrides:", *about]
    for line in (summary, *about, "", *derived):
        typer.echo(f"# {line}".rstrip())
    if changed:
        for key, (default, value) in changed_leaves(Recipe(), recipe).items():
            typer.echo(f"{key}: {value!r}  (default {default!r})")
        return
    typer.echo(yaml.safe_dump(to_mapping(recipe), sort_keys=False), nl=False)


@app.command("diff")
def diff(
    first: RecipeName,
    second: Annotated[str, typer.Argument(metavar="RECIPE", help="The other one.")],
) -> None:
    """The keys in which two recipes differ; nothing when they do not."""
    old, new = (load_recipe(name)[0] for name in (first, second))
    for key, (before, after) in changed_leaves(old, new).items():
        typer.echo(f"{key}: {before!r} -> {after!r}")


@app.command("cp")
def copy(
    name: RecipeName,
    target: Annotated[Path, typer.Argument(help="New .py file, or a folder for one of this name.")],
) -> None:
    """Copy a recipe to a file of your own, to be given to `opd run` by its path."""
    source = locate_recipe(name)
    path = target / source.name if target.is_dir() else target
    if path.suffix != ".py":
        raise ConfigError.of("TARGET", str(target), "a recipe is a .py file", f"say {target}.py")
    if path.exists():
        raise ConfigError.of("TARGET", str(path), "exists already", "choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.read_bytes())
    load_recipe(str(path))
    typer.echo(path)


def describe(recipe: Recipe) -> list[str]:
    """What a run will be, in a few lines: derived numbers included."""
    batch, learner = recipe.batch, recipe.learner
    layout = (
        f"TP={learner.tensor_parallel} PP={learner.pipeline_parallel} "
        f"CP={learner.context_parallel} DP={learner.data_parallel}"
    )
    return [
        f"recipe {recipe.name}: {recipe.summary}",
        *describe_loss(recipe),
        f"batch {batch.prompts_per_step} prompts x {batch.rollouts_per_prompt} rollouts = "
        f"{batch.samples_per_step} samples a step, {recipe.steps} steps",
        f"samples of at most {recipe.data.max_prompt_tokens} + {recipe.max_response_tokens} tokens, "
        f"{batch.tokens_per_microbatch} tokens a micro-batch"
        + (", padded" if batch.padded else ""),
        f"learner {layout} = {learner.world_size} ranks, {learner.precision}, {recipe.device}",
        *(
            f"teacher {name} {_where(teacher)}"
            for name, teacher in recipe.teachers.items()
            if len(recipe.teachers) > 1 or teacher.engine != "sglang"
        ),
        *([_devices(recipe)] if recipe.device == "cuda" else []),
    ]


def _devices(recipe: Recipe) -> str:
    facts = facts_of(recipe)
    roles = ", ".join(f"{role} {number}" for role, number in facts.gpus.items())
    return f"{facts.num_gpus} GPUs: {roles}"


def _where(teacher: TeacherConfig) -> str:
    if teacher.engine == "sglang":
        return f"on {teacher.server.num_servers} SGLang server(s)"
    return "inside the learner" + (", in host memory between uses" if teacher.offload else "")
