"""Who teaches a prompt: a pure function of the recipe, the row, the progress of training and the prompt's position.

A resumed run therefore asks the same teachers as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping

from opd_megatron.config.schema import DRAWS, MEANS, Recipe
from opd_megatron.teacher.target import Target
from opd_megatron.types import Prompt


def progress_of(recipe: Recipe, step: int) -> float:
    """Progress of training after `step` applied steps, in [0, 1]."""
    return min(1.0, step / (recipe.teaching.over_steps or recipe.steps))


def member_weights(recipe: Recipe) -> dict[str, float]:
    """Members of a mean or a draw: the recipe's, or every teacher, all alike."""
    return dict(recipe.teaching.weights) or dict.fromkeys(recipe.teachers, 1.0)


def member_starts(recipe: Recipe) -> list[tuple[str, float]]:
    """Members of a switch in the order of their turns, with the progress at which each begins."""
    starts = recipe.teaching.starts
    if not starts:
        count = len(recipe.teachers)
        return [(name, number / count) for number, name in enumerate(recipe.teachers)]
    return sorted(starts.items(), key=lambda start: start[1])


def members(recipe: Recipe) -> tuple[str, ...]:
    """Teachers that the kind of teaching chooses between or joins, in their order."""
    kind = recipe.teaching.kind
    if kind == "rows":
        return tuple(recipe.teachers)[:1]
    if kind in (*MEANS, *DRAWS):
        return tuple(member_weights(recipe))
    return tuple(name for name, _ in member_starts(recipe))


def named_teacher(recipe: Recipe, prompt: Prompt) -> str | None:
    """The teacher that a row names, itself or by its domain."""
    return prompt.teacher or recipe.teaching.domains.get(prompt.domain or "")


def target_of(recipe: Recipe, prompt: Prompt, position: int, step: int) -> Target:
    """Who teaches the prompt at a position of the endless stream, after `step` applied steps."""
    named = named_teacher(recipe, prompt)
    if named is not None:
        return Target.one(named)
    kind = recipe.teaching.kind
    if kind in MEANS:
        return Target.of(kind, member_weights(recipe))
    if kind in DRAWS:
        return Target.one(_drawn(member_weights(recipe), recipe.seed, position))
    if kind == "rows":
        return Target.one(members(recipe)[0])
    progress = progress_of(recipe, step)
    if kind == "hard_switch":
        return Target.one(_turn(member_starts(recipe), progress))
    return Target.of(recipe.teaching.mean, soft_weights(member_starts(recipe), progress))


def _turn(starts: list[tuple[str, float]], progress: float) -> str:
    """The last member that has begun."""
    return [name for name, start in starts if start <= progress][-1]


def soft_weights(starts: list[tuple[str, float]], progress: float) -> dict[str, float]:
    """Weights of the one or two members at this progress; linear in it between two starts."""
    for (name, start), (following, end) in itertools.pairwise(starts):
        if progress < end:
            share = (progress - start) / (end - start)
            return {name: 1.0 - share, following: share}
    return {starts[-1][0]: 1.0}


def _drawn(weights: Mapping[str, float], seed: int, position: int) -> str:
    """A member by weight. From a hash, which is the same in every version and on every machine."""
    digest = hashlib.blake2b(f"teacher:{seed}:{position}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64 * sum(weights.values())
    for name, weight in weights.items():
        point -= weight
        if point < 0.0:
            return name
    return list(weights)[-1]  # rounding of the last border
