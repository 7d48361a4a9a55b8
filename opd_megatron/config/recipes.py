"""Finding and loading recipes: `recipes/NAME.py` in a source tree, the copy inside an installed wheel, or a path.

A recipe file defines `recipe() -> Recipe` and has a docstring. Relative model and data paths in it are relative to
the file, or to the project's recipes, so a copied recipe keeps working; those in an override are relative to the
current directory. What is in neither is looked for as `config/locations.py` says.

Families (`recipes/families/`) hold what several recipes share. A recipe imports them as `recipes.families`, wherever it
lies: while it is loaded, the package `recipes` is the project's folder.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import sys
import types
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opd_megatron.config.locations import locate, map_paths
from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]


def recipe_folders() -> tuple[Path, ...]:
    """Folder searched for recipes: the copy inside an installed wheel, else the source tree's `recipes/`.

    Only a wheel has the copy. Beside an installed package lies site-packages, where a `recipes` may be anybody's.
    """
    candidates = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")
    return tuple(folder for folder in candidates if folder.is_dir())[:1]


def find_recipes() -> dict[str, Path]:
    """Map recipe name to file, sorted by name."""
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                found.setdefault(path.stem, path)
    return found


def locate_recipe(name: str) -> Path:
    """Resolve a recipe name or a path to a recipe file.

    Raises:
        ConfigError: no such recipe.
    """
    if name.endswith(".py") or os.sep in name:
        path = Path(name)
        if not path.is_file():
            raise ConfigError.of(
                "RECIPE",
                name,
                "no such recipe file",
                "give the path of a .py file, or a recipe name",
            )
        return path.resolve()
    known = find_recipes()
    if name not in known:
        raise ConfigError(
            f"RECIPE={name!r}: no such recipe{did_you_mean(name, known)}; "
            f"see `opd recipes list` ({', '.join(known)})"
        )
    return known[name]


@contextmanager
def _families() -> Generator[None]:
    """Let `import recipes.families.x` find the project's recipes, and leave no trace of it."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "recipes"]

    before = {name: sys.modules.pop(name) for name in ours()}
    package = types.ModuleType("recipes")
    package.__path__ = [str(folder) for folder in recipe_folders()]
    sys.modules["recipes"] = package
    try:
        yield
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def load_recipe(name: str) -> tuple[Recipe, Path]:
    """Load a recipe by name or path; paths inside it come back absolute where they exist beside it.

    Raises:
        ConfigError: no such recipe, the file does not define `recipe()`, or it raises.
    """
    path = locate_recipe(name)
    spec = importlib.util.spec_from_file_location(f"opd_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with _families():
            spec.loader.exec_module(module)
            value = module.recipe()
    except (ImportError, AttributeError, TypeError, SyntaxError, NameError) as error:
        raise ConfigError(
            f"recipe {path}: {type(error).__name__}: {error}; a recipe file defines "
            f"`def recipe() -> Recipe` with fields of opd_megatron.config.schema"
        ) from error
    if not isinstance(value, Recipe):
        raise ConfigError(f"recipe {path}: recipe() returned {type(value).__name__}, not Recipe")
    value = dataclasses.replace(
        value,
        name=path.stem,
        summary=value.summary or (module.__doc__ or "").strip().split("\n")[0],
    )
    for folder in (path.parent, *recipe_folders()):
        value = resolve_paths(value, folder)
    return value, path


def about_recipe(path: Path) -> str:
    """The docstring of a recipe file below its first line, which is the summary: source, what to expect, how to run."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[2].strip()


def resolve_recipe(name: str, overrides: Sequence[str], here: bool = True) -> tuple[Recipe, Path]:
    """A recipe by name or path with overrides applied, and its file.

    Args:
        here: it will run on this machine, so models and prompt files that it names are looked for here.

    Raises:
        ConfigError: as `load_recipe` and `apply_overrides`.
    """
    recipe, path = load_recipe(name)
    return override_recipe(recipe, overrides, here), path


def override_recipe(recipe: Recipe, overrides: Sequence[str], here: bool = True) -> Recipe:
    """Apply overrides and find models and data; paths are relative to the current directory, `~` is the home directory.

    Args:
        here: as for `resolve_recipe`.

    Raises:
        ConfigError: as `apply_overrides`.
    """
    changed = resolve_paths(apply_overrides(recipe, overrides), Path.cwd())
    return locate(changed) if here else changed


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make relative model and data paths absolute when they exist below `folder`."""

    def absolute(path: str) -> str:
        path = os.path.expanduser(path)
        if path and not os.path.isabs(path) and (folder / path).exists():
            return str((folder / path).resolve())
        return path

    return map_paths(recipe, absolute, absolute)
