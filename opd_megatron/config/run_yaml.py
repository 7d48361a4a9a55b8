"""`run.yaml`: the fully resolved recipe of a run, the only configuration its processes read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from opd_megatron import __version__
from opd_megatron.atomic import write_bytes
from opd_megatron.config.overrides import from_mapping, to_mapping
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError

RUN_YAML = "run.yaml"


def write_run_yaml(path: Path, recipe: Recipe, recipe_file: Path, overrides: Sequence[str]) -> None:
    """Freeze the resolved recipe beside where it came from."""
    content = {
        "opd_megatron": __version__,
        "recipe_file": str(recipe_file),
        "overrides": list(overrides),
        "recipe": to_mapping(recipe),
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_bytes(path, text.encode())


def read_run_yaml(path: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        ConfigError: missing file, not a mapping, or keys of another version.
    """
    return from_mapping(read_run_mapping(path)["recipe"], str(path))


def read_run_mapping(path: Path) -> dict[str, Any]:
    """The whole of run.yaml as plain values."""
    if not path.is_file():
        raise ConfigError.of(
            "run directory", str(path.parent), f"has no {path.name}", "check the path"
        )
    try:
        loaded = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}; undo the edit") from error
    content = cast(dict[str, Any], loaded) if isinstance(loaded, dict) else {}
    if not isinstance(content.get("recipe"), dict):
        raise ConfigError(f"{path}: not a run.yaml; it must hold a mapping with the key 'recipe'")
    return content
