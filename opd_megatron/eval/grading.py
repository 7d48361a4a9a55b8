"""Graders: is this response right?

A grader is called as `grader(prompt_text, response_text, answer, ended) -> bool`. `response_text`
carries no special tokens; `ended` says that the model ended the response itself. A response that
was cut is wrong for every grader: the text so far may be right by luck, and a model that never
stops should not score.

    exact_match       the whole response is the answer
    math_verify       the last boxed or final expression equals the answer; package math-verify
    column_addition   every written step and the answer are right (the demo's task)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from opd_megatron.errors import DataError
from opd_megatron.eval.column_addition import is_right_derivation
from opd_megatron.eval.math_verify_grader import MathVerifyGrader
from opd_megatron.registry import Registry
from opd_megatron.types import Prompt


class Grader(Protocol):
    def __call__(
        self, prompt_text: str, response_text: str, answer: str | None, ended: bool
    ) -> bool: ...


GRADERS: Registry[Callable[[], Grader]] = Registry("grader")
GRADERS.register("math_verify")(MathVerifyGrader)


def make_grader(name: str, key: str = "evaluation.grader") -> Grader:
    """The grader of that name, ready for use.

    Raises:
        ConfigError: no such grader, or it needs a package that is not installed.
    """
    return GRADERS.get(name, key)()


def check_answers(prompts: Iterable[Prompt]) -> None:
    """
    Raises:
        DataError: a held-out prompt has no answer to grade against.
    """
    for prompt in prompts:
        if prompt.answer is None:
            raise DataError(
                f"{prompt.source}: prompt {prompt.id!r} has no answer, and evaluation needs one; "
                "add it or set data.answer_key"
            )


def exact_match(prompt_text: str, response_text: str, answer: str | None, ended: bool) -> bool:
    """The response equals the answer, up to white space at both ends."""
    return ended and answer is not None and response_text.strip() == answer.strip()


def column_addition(prompt_text: str, response_text: str, answer: str | None, ended: bool) -> bool:
    """Every step is right. The sum follows from the prompt; a given answer must agree with it."""
    right = ended and is_right_derivation(prompt_text, response_text)
    return right and (answer is None or response_text.endswith(f">{answer}"))


@GRADERS.register("exact_match")
def _make_exact_match() -> Grader:
    return exact_match


@GRADERS.register("column_addition")
def _make_column_addition() -> Grader:
    return column_addition
