"""`key.sub=value` overrides on a recipe, through OmegaConf structured configs.

OmegaConf parses and type-checks the value; this file only turns its errors into ones that name the key, the
value, the rule and the fix, with a suggestion for a mistyped key.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, did_you_mean


@functools.cache
def _fields(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def leaf_type(key: str) -> Any:
    """The annotated type of a dotted recipe key, e.g. `learner.tensor_parallel` -> int.

    Raises:
        ConfigError: no such key; suggests the closest one.
    """
    current: Any = Recipe
    parts = key.split(".")
    for position, part in enumerate(parts):
        if typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
            continue
        prefix = ".".join(parts[:position])
        if not dataclasses.is_dataclass(current):
            raise ConfigError(f"{key}: {prefix!r} is a value, not a section; override {prefix}=...")
        known = _fields(typing.cast(type, current))
        if part not in known:
            where = f"in section {prefix!r}" if prefix else "at the top level"
            raise ConfigError(
                f"{key}: no such key {where}{did_you_mean(part, known)}; known: {', '.join(known)}"
            )
        current = known[part]
    return current


def _writable(recipe: Recipe) -> DictConfig:
    config = OmegaConf.structured(recipe)

    def unlock(node: Any) -> None:
        if OmegaConf.is_dict(node):
            OmegaConf.set_readonly(node, False)
            for name in node:
                unlock(node._get_node(name))

    unlock(config)
    return config


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with `key=value` overrides applied, in order.

    Raises:
        ConfigError: not of the form key=value, unknown key, or a value of the wrong type.
    """
    config = _writable(recipe)
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError.of(
                "override", override, "not of the form key=value", "e.g. learner.tensor_parallel=1"
            )
        wanted = leaf_type(key)
        if dataclasses.is_dataclass(wanted) or typing.get_origin(wanted) is dict:
            raise ConfigError.of(
                key, text, "this is a section", f"override one of its keys: {key}.x=..."
            )
        # OmegaConf reads nothing as null; for text it means the empty string.
        written = f"{key}=''" if wanted is str and not text.strip() else override
        try:
            config = typing.cast(
                DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist([written]))
            )
        except OmegaConfBaseException as error:
            name = wanted.__name__ if isinstance(wanted, type) else str(wanted)
            if isinstance(wanted, types.UnionType):
                name = str(wanted)
            raise ConfigError.of(
                key, text, f"must be {name}", f"e.g. {key}={_example(wanted)}"
            ) from error
    return typing.cast(Recipe, OmegaConf.to_object(config))


def _example(wanted: Any) -> str:
    return {int: "2", float: "0.5", bool: "true"}.get(wanted, "text")


def change(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values at some dotted keys: what a recipe file is made of, a family and its differences.

    A new name below `teachers` makes a new teacher.

    Raises:
        ConfigError: unknown key (suggests the closest one), or a value of another type.
    """
    changed: Any = recipe
    for key, value in values.items():
        wanted = leaf_type(key)
        accepted = (int, float) if wanted is float else typing.get_origin(wanted) or wanted
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError.of(key, value, f"must be {wanted}", "correct the recipe")
        changed = _changed(changed, Recipe, key.split("."), value)
    return typing.cast(Recipe, changed)


def _changed(section: Any, kind: Any, parts: list[str], value: Any) -> Any:
    if not parts:
        return value
    name, *rest = parts
    if typing.get_origin(kind) is dict:
        child = typing.get_args(kind)[1]
        old = section.get(
            name, typing.cast(type, child)() if dataclasses.is_dataclass(child) else None
        )
        return {**section, name: _changed(old, child, rest, value)}
    new = _changed(getattr(section, name), _fields(kind)[name], rest, value)
    return dataclasses.replace(section, **{name: new})


def from_mapping(values: dict[str, Any], source: str) -> Recipe:
    """Build a recipe from a plain mapping (a frozen run.yaml), refusing unknown keys.

    Raises:
        ConfigError: unknown key or wrong type; the message names `source`.
    """
    try:
        merged = OmegaConf.merge(_writable(Recipe()), OmegaConf.create(values))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{source}: {error.full_key or 'recipe'}: {str(error).splitlines()[0]}; "
            f"undo the edit, or use the version that wrote the file"
        ) from error
    return typing.cast(Recipe, OmegaConf.to_object(merged))


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dict of every field."""
    return dataclasses.asdict(recipe)


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Flat `{dotted key: value}` of every field, in declaration order."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, child in typing.cast(dict[str, Any], value).items():
                walk(f"{prefix}.{name}" if prefix else name, child)
        else:
            flat[prefix] = value

    walk("", to_mapping(recipe))
    return flat


def changed_leaves(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """`{key: (old, new)}` for every leaf that differs; a leaf on one side only has None on the other."""
    a, b = leaves(old), leaves(new)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}
