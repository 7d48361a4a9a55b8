"""Rollouts and their scores become samples: which tokens may train, and what a graded response earns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from opd_megatron.config.schema import Recipe
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.errors import ContractError
from opd_megatron.eval.grading import Grader, make_grader
from opd_megatron.losses.settings import LossSettings
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.target import Target
from opd_megatron.types import Prompt, Rollout, Sample, TeacherScores


class SampleMaker:
    """Makes the samples of one prompt.

    Attributes:
        aliases: of each teacher.
        temperatures: of each teacher.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: ChatTokenizer, aliases: Mapping[str, TokenAliases]
    ) -> None:
        settings = LossSettings.of(recipe)
        self.aliases = aliases
        self.temperatures = {name: t.temperature for name, t in recipe.teachers.items()}
        self._tokenizer = tokenizer
        self._masked_ids = _masked_ids(recipe.objective.mask_special_tokens, tokenizer)
        self._grader: Grader | None = None
        if settings.task.coefficient > 0.0:
            self._grader = make_grader(settings.task.grader, "task.grader")

    def make(
        self, prompt: Prompt, rollouts: Sequence[Rollout], scores: Sequence[TeacherScores]
    ) -> tuple[Sample, ...]:
        """One sample per rollout, in order. Grading may take a while: call it in a thread."""
        return tuple(
            Sample(r, s, trainable=self._trainable(r, s.teacher), reward=self._reward(prompt, r))
            for r, s in zip(rollouts, scores, strict=True)
        )

    def _trainable(self, rollout: Rollout, target: str) -> NDArray[np.bool_]:
        masked = np.isin(rollout.response_ids, self._masked_ids) | ~rollout.sampled
        for teacher in Target.parse(target).members:
            aliases = self.aliases.get(teacher, TokenAliases())
            masked |= aliases.unscorable(rollout.response_ids, not rollout.truncated)
        return ~masked

    def _reward(self, prompt: Prompt, rollout: Rollout) -> float | None:
        if self._grader is None:
            return None
        if rollout.reward is not None:
            return rollout.reward
        if prompt.answer is None:
            raise ContractError(f"prompt {prompt.id}: no answer to grade the task with")
        text = self._tokenizer.decode_response(rollout.response_ids)
        return float(self._grader(prompt.text, text, prompt.answer, not rollout.truncated))


def _masked_ids(rule: str, tokenizer: ChatTokenizer) -> list[int]:
    """Ids that do not train under `objective.mask_special_tokens`."""
    if rule == "none":
        return []
    kept = set(tokenizer.eos_ids) if rule == "all_but_end" else set[int]()
    return sorted(tokenizer.special_ids - kept)
