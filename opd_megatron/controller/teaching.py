"""Who teaches which prompt in a run, and how those who do are asked.

The service calls it for one prompt at a time: `prompt_for` before generation (a control text for the student),
`score` after it. Targets inside the learner get places for scores, which the learner fills.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from opd_megatron.config.schema import DataConfig, Recipe
from opd_megatron.controller.roles import Roles
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.errors import ConfigError
from opd_megatron.losses.settings import LossSettings
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.choice import target_of
from opd_megatron.teacher.in_process import unscored
from opd_megatron.teacher.routes import route_of
from opd_megatron.teacher.target import Target, is_inside
from opd_megatron.teacher.target_scoring import Wanted, score_target
from opd_megatron.types import Prompt, Rollout, Sample, TeacherScores


def wanted_of(recipe: Recipe, vocab_size: int) -> Wanted:
    """What the loss of a recipe needs of its served teachers."""
    settings = LossSettings.of(recipe)
    if not recipe.served_teachers or recipe.is_supervised:
        return Wanted()
    return Wanted(
        support=recipe.objective.support if settings.has_support else "",
        # A teacher has no more than the whole vocabulary to send.
        topk=min(settings.teacher_topk, vocab_size),
        route=route_of(recipe, vocab_size),
        temperatures={name: teacher.temperature for name, teacher in recipe.teachers.items()},
    )


class Teaching:
    """The teachers of a run.

    Attributes:
        wanted: what served teachers are asked for, and rollouts bring along.
        control_ids: the tokens of each member's control text.
    """

    def __init__(
        self,
        recipe: Recipe,
        roles: Roles,
        tokenizer: ChatTokenizer,
        aliases: Mapping[str, TokenAliases],
    ) -> None:
        self.wanted = wanted_of(recipe, tokenizer.vocab_size)
        self.control_ids = control_ids_of(recipe, tokenizer)
        self._recipe = recipe
        self._roles = roles
        self._aliases = aliases

    def target(self, prompt: Prompt, position: int, step: int) -> Target:
        """Who teaches the prompt at a position, after `step` applied steps."""
        return target_of(self._recipe, prompt, position, step)

    def prompt_for(self, prompt: Prompt, position: int, step: int) -> tuple[Prompt, int]:
        """The prompt as the student reads it, and how many of its tokens are a control text."""
        target = self.target(prompt, position, step)
        control = self.control_ids.get(target.name, ())
        return replace(prompt, token_ids=control + prompt.token_ids), len(control)

    def is_inside(self, target: Target) -> bool:
        return is_inside(target.name, self._recipe.in_process_teachers)

    def unscored(self, target: Target, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Places for the scores of a target inside the learner."""
        return [unscored(rollout, target.name, self.wanted.width) for rollout in rollouts]

    async def score(self, target: Target, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """
        Raises:
            ServerError, ContractError: from a server; no score is returned.
        """
        return await score_target(
            self._roles.teachers, target, rollouts, self.wanted, self._aliases
        )


def control_ids_of(recipe: Recipe, tokenizer: ChatTokenizer) -> dict[str, tuple[int, ...]]:
    """Tokens of the control texts, by member."""
    texts = recipe.teaching.control_texts
    return {name: tokenizer.encode_text(text) for name, text in texts.items()}


def data_config(recipe: Recipe, tokenizer: ChatTokenizer) -> DataConfig:
    """`recipe.data` with room for the longest control text within `max_prompt_tokens`.

    Raises:
        ConfigError: a control text can not be encoded, is read as one of another's, or leaves no room.
    """
    try:
        ids = control_ids_of(recipe, tokenizer)
    except ValueError as error:
        raise ConfigError.of(
            "teaching.control_texts",
            dict(recipe.teaching.control_texts),
            f"the student's tokenizer refuses one ({error})",
            "use text that it knows",
        ) from error
    if len(set(ids.values())) != len(ids) or not all(ids.values()):
        raise ConfigError.of(
            "teaching.control_texts",
            dict(recipe.teaching.control_texts),
            "the student reads two of them as the same tokens, or one as none",
            "choose texts that differ in its tokens",
        )
    longest = max(map(len, ids.values()), default=0)
    room = recipe.data.max_prompt_tokens - longest
    if room < 1:
        raise ConfigError.of(
            "data.max_prompt_tokens",
            recipe.data.max_prompt_tokens,
            f"a control text alone has {longest} tokens",
            "raise it by that",
        )
    return replace(recipe.data, max_prompt_tokens=room)


def teaching_metrics(samples: Sequence[Sample], teachers: Collection[str]) -> dict[str, float]:
    """teacher/* of a step: whose tokens were trained on, and what servers could not say exactly."""
    tokens = dict.fromkeys(teachers, 0.0)
    left_out: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    for sample in samples:
        scores = sample.scores
        for name, weight in Target.parse(scores.teacher).weights:
            count = weight * len(sample.rollout.response_ids)
            tokens[name] += count
        if scores.left_out is not None:
            left_out.append(scores.left_out)
        if scores.error_nats is not None:
            errors.append(scores.error_nats)
    total = sum(tokens.values())
    metrics: dict[str, float] = {}
    if len(tokens) > 1 and total:
        metrics = {f"teacher/share/{name}": count / total for name, count in tokens.items()}
    if left_out:
        metrics["teacher/left_out_mass"] = float(np.concatenate(left_out).mean())
    if errors:
        metrics["teacher/error_nats_max"] = float(np.concatenate(errors).max(initial=0.0))
    return metrics
