"""What an environment is, and where those that a recipe can name register.

    reset(prompt)     a new episode; the prompt's messages open the conversation
    step(response)    the student's turn as text -> messages that answer it, or the end, and the reward so far

What the student writes trains; what the environment writes is read by the student, scored by nobody and never
trained. One object plays one episode. `step` may take a while: it is called in a thread, and other episodes are in
theirs.

Left out: environments that are servers of their own, tool calls in a model's own format (an environment may parse
them from the text), images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from opd_megatron.config.schema import EnvironmentConfig
from opd_megatron.registry import Registry
from opd_megatron.types import Prompt

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Step:
    """The answer to a turn. No messages: the episode is over. `reward`, in [0, 1], is of the episode so far."""

    messages: tuple[Message, ...]
    reward: float


class Environment(Protocol):
    """See the module docstring."""

    def reset(self, prompt: Prompt) -> None: ...

    def step(self, response: str) -> Step: ...


NewEnvironment = Callable[[], Environment]

# Name -> of the recipe's section, what makes an object for each episode. What episodes share (a grader) is made once.
ENVIRONMENTS: Registry[Callable[[EnvironmentConfig], NewEnvironment]] = Registry("environment")
