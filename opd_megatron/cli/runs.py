"""`opd run`, `opd probe` and `opd eval`: commands that start processes."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer

from opd_megatron.cli.recipes import Overrides, RecipeName, describe
from opd_megatron.config.recipes import override_recipe, resolve_recipe
from opd_megatron.config.resume import refuse_other_run
from opd_megatron.config.rules import check
from opd_megatron.config.run_yaml import read_run_mapping, read_run_yaml
from opd_megatron.config.schema import Recipe
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
        bool,
        typer.Option("--resume", help="Go on with the run in --run-dir, as its run.yaml says."),
    ] = False,
) -> None:
    """Run a recipe on this machine."""
    overrides = list(overrides or [])
    if resume and run_dir is None:
        raise ConfigError.of("--resume", True, "needs to know which run", "add --run-dir DIR")
    if resume and run_dir is not None:
        recipe, path, overrides = _started(RunDir(run_dir.resolve()), name, overrides)
    else:
        recipe, path = resolve_recipe(name, overrides)
    check(recipe)
    from opd_megatron.launch.local import run_local

    run_directory = RunDir((run_dir or default_run_dir(recipe.name)).resolve())
    for line in describe(recipe):
        _say(line)
    _say(f"run directory {run_directory.root}")
    sys.exit(run_local(recipe, path, overrides, run_directory, resume, _say))


def _started(run: RunDir, name: str, overrides: list[str]) -> tuple[Recipe, Path, list[str]]:
    """What a run was started as, with more overrides on top: recipe, recipe file, all overrides."""
    content = read_run_mapping(run.run_yaml)
    started = read_run_yaml(run.run_yaml)
    # The recipe file may be gone or edited since; only its name says whether this is the run that was meant.
    if started.name not in (name, Path(name).stem):
        raise ConfigError.of(
            "RECIPE", name, f"the run in {run.root} is of {started.name!r}", f"say {started.name}"
        )
    resumed = override_recipe(started, overrides)
    refuse_other_run(started, resumed)
    return resumed, Path(content["recipe_file"]), [*content["overrides"], *overrides]


def _recipe_or_run(
    name: str, overrides: list[str], model: Path | None
) -> tuple[Recipe, Path, list[str]]:
    """What to evaluate: a recipe's student, or the newest weights of a run; `model` takes their place."""
    run = RunDir(Path(name).resolve())
    if not run.run_yaml.is_file():
        if model is not None:
            overrides = [*overrides, f"student.path={model.resolve()}"]
        return *resolve_recipe(name, overrides), overrides
    started = read_run_yaml(run.run_yaml)
    if model is None and started.weight_sync.route == "broadcast":
        # Whatever lies in weights/ is of an attempt before this one.
        raise ConfigError.of(
            "weight_sync.route",
            "broadcast",
            f"{name} leaves no directory of its newest weights",
            f"opd export {name} --out DIR, then opd eval {name} --model DIR",
        )
    published = run.published()
    if model is None and not published:
        raise ConfigError.of(
            "RECIPE or RUN",
            name,
            "this run has published no weights yet",
            "wait for its first step",
        )
    overrides = [*overrides, f"student.path={(model or published[-1]).resolve()}"]
    return override_recipe(started, overrides), run.run_yaml, overrides


def evaluate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="Recipe name or path, or a run directory: its newest weights.",
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Hugging Face directory to evaluate instead."),
    ] = None,
    run_dir: RunDirOption = None,
) -> None:
    """Held-out accuracy of a model and its KL to the teacher, with the recipe's evaluation settings.

    Writes a run directory of its own, with eval.json.
    """
    recipe, path, overrides = _recipe_or_run(name, list(overrides or []), model)
    check(recipe)
    from opd_megatron.launch.local import evaluate_local

    directory = RunDir((run_dir or default_run_dir(f"eval-{recipe.name}")).resolve())
    _say(f"evaluating {recipe.student.path}")
    _say(f"run directory {directory.root}")
    sys.exit(evaluate_local(recipe, path, overrides, directory, _say))


def probe(name: RecipeName, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Compare the teachers of a recipe with its student before training: a table, and probe.json in a run directory.

    Every teacher scores the same few rollouts of the student (preflight.probe_prompts, probe_rollouts, probe_topk).
    """
    overrides = list(overrides or [])
    recipe, path = resolve_recipe(name, overrides)
    check(recipe)
    from opd_megatron.launch.local import probe_local

    directory = RunDir((run_dir or default_run_dir(f"probe-{recipe.name}")).resolve())
    _say(f"probing {', '.join(recipe.teachers)}")
    _say(f"run directory {directory.root}")
    sys.exit(probe_local(recipe, path, overrides, directory, _say))
