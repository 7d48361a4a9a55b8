"""`opd run` and `opd eval`: commands that start processes."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer

from opd_megatron.cli.recipes import Overrides, RecipeName, describe
from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.errors import ConfigError
from opd_megatron.rundir import RunDir


def _say(text: str) -> None:
    print(text, flush=True)


def default_run_dir(name: str) -> Path:
    """`runs/<recipe>-<UTC time>`; a second one in the same second gets a number."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path, number = Path("runs") / f"{name}-{stamp}", 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{stamp}-{number}"
    return path


RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="Where the run writes. Default: runs/RECIPE-TIME.")
]


def run(
    name: RecipeName,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last commit in --run-dir.")
    ] = False,
) -> None:
    """Run a recipe on this machine."""
    if resume and run_dir is None:
        raise ConfigError.of("--resume", True, "needs to know which run", "add --run-dir DIR")
    recipe, path = load_recipe(name)
    recipe = apply_overrides(recipe, overrides or [])
    from opd_megatron.launch.local import run_local

    run_directory = RunDir((run_dir or default_run_dir(recipe.name)).resolve())
    for line in describe(recipe):
        _say(line)
    _say(f"run directory {run_directory.root}")
    sys.exit(run_local(recipe, path, overrides or [], run_directory, resume, _say))


def evaluate(
    name: RecipeName,
    overrides: Overrides = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Hugging Face directory. Default: the recipe's student."),
    ] = None,
    run_dir: RunDirOption = None,
) -> None:
    """Held-out accuracy of a model and its KL to the teacher, with the recipe's evaluation settings."""
    recipe, path = load_recipe(name)
    overrides = list(overrides or [])
    if model is not None:
        overrides.append(f"student.path={model.resolve()}")
    recipe = apply_overrides(recipe, overrides)
    from opd_megatron.launch.local import evaluate_local

    directory = RunDir((run_dir or default_run_dir(f"eval-{recipe.name}")).resolve())
    _say(f"run directory {directory.root}")
    sys.exit(evaluate_local(recipe, path, overrides, directory, _say))
