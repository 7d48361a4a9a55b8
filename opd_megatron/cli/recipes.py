"""`opd recipes list|show` and `opd validate`."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from opd_megatron.cli.objectives import describe_loss
from opd_megatron.config.overrides import changed_leaves, to_mapping
from opd_megatron.config.recipes import find_recipes, load_recipe, resolve_recipe
from opd_megatron.config.rules import check
from opd_megatron.config.schema import Recipe, TeacherConfig
from opd_megatron.launch.preflight import check_inputs, check_learner

app = typer.Typer(help="The recipes that come with the project.", no_args_is_help=True)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe name or path to a .py file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Overrides, e.g. optimizer.lr=1e-4."),
]


@app.command("list")
def list_recipes() -> None:
    """One line per recipe."""
    found = {name: load_recipe(str(path))[0] for name, path in find_recipes().items()}
    width = max(map(len, found), default=0)
    for name, recipe in found.items():
        typer.echo(f"{name:<{width}}  {recipe.summary}")


@app.command("show")
def show(
    name: RecipeName,
    overrides: Overrides = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what differs from the defaults.")
    ] = False,
) -> None:
    """The fully resolved recipe as YAML."""
    recipe, _ = resolve_recipe(name, overrides or [])
    if changed:
        for key, (default, value) in changed_leaves(Recipe(), recipe).items():
            typer.echo(f"{key}: {value!r}  (default {default!r})")
        return
    typer.echo(yaml.safe_dump(to_mapping(recipe), sort_keys=False), nl=False)


def validate(name: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe, its models' layout, tokenizers and data, without starting anything.

    Not checked here: what needs the tokenizer itself (prompts that are too long or that it can not encode, which a
    run counts and rejects at its start), and this machine (`opd doctor`).
    """
    recipe, _ = resolve_recipe(name, overrides or [])
    check(recipe)
    check_learner(recipe)
    facts = check_inputs(recipe)
    for line in describe(recipe):
        typer.echo(line)
    scans = [facts.train] + ([facts.heldout] if facts.heldout else [])
    for scan in scans:
        refused = scan.rejections.by_reason
        reasons = ", ".join(f"{reason} {count}" for reason, count in refused.items())
        typer.echo(
            f"{scan.key}: {len(scan.rows)} of {scan.num_rows} rows well formed"
            + (f"; rejected: {reasons}" if reasons else "")
        )
        for example in scan.rejections.examples:
            typer.echo(f"  {example}")
    typer.echo(f"tokenizer: {facts.vocab_size} ids, the same for student and teachers")
    typer.echo("valid")


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
        f"learner {layout} = {learner.world_size} ranks, {learner.precision}, {recipe.device}",
        *(
            f"teacher {name} {_where(teacher)}"
            for name, teacher in recipe.teachers.items()
            if len(recipe.teachers) > 1 or teacher.engine != "sglang"
        ),
    ]


def _where(teacher: TeacherConfig) -> str:
    if teacher.engine == "sglang":
        return f"on {teacher.server.num_servers} SGLang server(s)"
    return "inside the learner" + (", in host memory between uses" if teacher.offload else "")
