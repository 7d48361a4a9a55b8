"""Asks the question again until the answer is right.

    student       4+0=4,5+8=13>45
    environment   40+85:
    student       0+5=5,8+4=12>125          right: the episode is over, its reward is 1

The simplest thing that needs a conversation: the student sees its own wrong answer and that it was refused, and the
teacher scores how it goes on from there. Right is what the grader says. Works with any data that has answers.
"""

from __future__ import annotations

from opd_megatron.config.schema import EnvironmentConfig
from opd_megatron.environments.environment import ENVIRONMENTS, NewEnvironment, Step
from opd_megatron.errors import DataError
from opd_megatron.eval.grading import Grader, make_grader
from opd_megatron.types import Prompt


class TryAgain:
    """One episode at a time."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self._prompt: Prompt | None = None

    def reset(self, prompt: Prompt) -> None:
        """
        Raises:
            DataError: the prompt has no answer.
        """
        if prompt.answer is None:
            raise DataError(f"{prompt.source}: environment.name=try_again needs an answer to grade")
        self._prompt = prompt

    def step(self, response: str) -> Step:
        prompt = self._prompt
        assert prompt is not None and prompt.answer is not None, "reset comes first"
        if self._grader(prompt.text, response, prompt.answer, True):
            return Step((), 1.0)
        return Step(({"role": "user", "content": prompt.text},), 0.0)


@ENVIRONMENTS.register("try_again")
def _maker(config: EnvironmentConfig) -> NewEnvironment:
    grader = make_grader(config.grader, "environment.grader")
    return lambda: TryAgain(grader)
