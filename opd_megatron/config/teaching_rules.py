"""Rules on `teaching`: members that exist, weights that are weights, turns in order. As `rules.py`, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from opd_megatron.config.schema import DRAWS, MAX_MEMBERS, MEANS, SWITCHES, Recipe
from opd_megatron.errors import did_you_mean


def teaching_problems(recipe: Recipe) -> Iterator[str]:
    """Every violated rule, one line each."""
    config = recipe.teaching
    yield from _unused(recipe)
    for key in ("weights", "starts", "control_texts"):
        yield from _unknown(f"teaching.{key}", getattr(config, key), recipe)
    for domain, teacher in config.domains.items():
        if teacher not in recipe.teachers:
            yield (
                f"teaching.domains.{domain}={teacher!r}: no such teacher"
                f"{did_you_mean(teacher, recipe.teachers)}; use one of: {', '.join(recipe.teachers)}"
            )
    if recipe.evaluation.teacher and recipe.evaluation.teacher not in recipe.teachers:
        yield (
            f"evaluation.teacher={recipe.evaluation.teacher!r}: no such teacher"
            f"{did_you_mean(recipe.evaluation.teacher, recipe.teachers)}; use one of: {', '.join(recipe.teachers)}"
        )
    yield from _weights(config.weights)
    yield from _starts(config.starts)
    if config.kind != "rows":
        yield from _number_of_members(recipe)
    if config.kind == "control_token":
        yield from _control_texts(recipe)
    joins = config.kind in MEANS or config.kind == "soft_switch"
    engines = {name: recipe.teachers[name].engine for name in _members(recipe)}
    if joins and len(set(engines.values())) > 1:
        yield (
            f"teaching.kind={config.kind!r}: the members of a mean must be all served or all inside the learner, and "
            f"are {engines}; give them one teachers.NAME.engine, or use hard_switch or random"
        )


def _members(recipe: Recipe) -> list[str]:
    config = recipe.teaching
    listed = config.starts if config.kind in SWITCHES else config.weights
    return [name for name in (listed or recipe.teachers) if name in recipe.teachers]


def _unused(recipe: Recipe) -> Iterator[str]:
    """A setting that the kind does not read would be a wish that nobody hears."""
    config = recipe.teaching
    readers = {
        "weights": (*MEANS, *DRAWS),
        "starts": SWITCHES,
        "control_texts": ("control_token",),
        "over_steps": SWITCHES,
    }
    for key, kinds in readers.items():
        value = getattr(config, key)
        if value and config.kind not in kinds:
            yield (
                f"teaching.{key}={value!r}: teaching.kind={config.kind!r} does not use it; leave it out, or use "
                f"one of: {', '.join(kinds)}"
            )
    if recipe.is_supervised and config.kind != "rows":
        yield (
            f"teaching.kind={config.kind!r}: objective.estimator=cross_entropy learns from given responses; "
            f"set teaching.kind=rows"
        )


def _unknown(key: str, listed: Mapping[str, object], recipe: Recipe) -> Iterator[str]:
    for name in listed:
        if name not in recipe.teachers:
            yield (
                f"{key}.{name}: no such teacher{did_you_mean(name, recipe.teachers)}; "
                f"use one of: {', '.join(recipe.teachers)}"
            )


def _weights(weights: Mapping[str, float]) -> Iterator[str]:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0.0):
            yield f"teaching.weights.{name}={weight!r}: must be above 0; leave the teacher out instead"


def _starts(starts: Mapping[str, float]) -> Iterator[str]:
    for name, start in starts.items():
        if not 0.0 <= start < 1.0:
            yield f"teaching.starts.{name}={start!r}: must lie in [0, 1), the progress of training; fix it"
    if starts and min(starts.values()) != 0.0:
        yield f"teaching.starts={dict(starts)!r}: nobody teaches at progress 0; let one start at 0.0"
    if len(set(starts.values())) != len(starts):
        yield f"teaching.starts={dict(starts)!r}: two begin at once; give each a start of its own"


def _number_of_members(recipe: Recipe) -> Iterator[str]:
    count = len(_members(recipe))
    if not 2 <= count <= MAX_MEMBERS:
        yield (
            f"teaching.kind={recipe.teaching.kind!r}: joins 2 to {MAX_MEMBERS} teachers, and there are {count}; "
            f"add or remove some, or set teaching.kind=rows"
        )


def _control_texts(recipe: Recipe) -> Iterator[str]:
    config = recipe.teaching
    texts = config.control_texts
    for name in _members(recipe):
        if not texts.get(name):
            yield (
                f"teaching.control_texts.{name}: teaching.kind='control_token' needs a text for every member; "
                f"set it, to something that no prompt begins with"
            )
        if recipe.teachers[name].engine != "sglang":
            yield (
                f"teachers.{name}.engine={recipe.teachers[name].engine!r}: a teacher inside the learner reads the "
                f"student's own tokens, the control text too; set it to sglang, or teaching.kind=random"
            )
    if len(set(texts.values())) != len(texts):
        yield f"teaching.control_texts={dict(texts)!r}: two members share one; give each its own"
