"""Who answers the student: every name in the schema exists, and asking again until the answer is right."""

from __future__ import annotations

import dataclasses

import pytest

from opd_megatron.config.schema import EnvironmentConfig
from opd_megatron.environments import try_again
from opd_megatron.environments.catalog import environment_maker
from opd_megatron.environments.environment import ENVIRONMENTS, Step
from opd_megatron.errors import ConfigError, DataError
from opd_megatron.eval import grading
from opd_megatron.eval.grading import Grader
from opd_megatron.types import Prompt

PROMPT = Prompt("p", (2, 8), "40+85:", "125", None, "train.jsonl:1")
CONFIG = EnvironmentConfig(name="try_again", grader="column_addition", max_turns=2)


def test_the_schema_and_the_table_name_the_same_environments() -> None:
    environment_maker(CONFIG)
    (field,) = (f for f in dataclasses.fields(EnvironmentConfig) if f.name == "name")
    assert set(field.metadata["choices"]) == {"none", *ENVIRONMENTS}


def test_a_wrong_answer_is_asked_for_again_and_a_right_one_ends_the_episode() -> None:
    environment = environment_maker(CONFIG)()
    environment.reset(PROMPT)
    again = Step(({"role": "user", "content": "40+85:"},), 0.0)
    assert environment.step("4+0=4,5+8=13>45") == again
    assert environment.step("") == again
    assert environment.step("0+5=5,8+4=12>125") == Step((), 1.0)


def test_episodes_have_an_environment_each_and_one_grader(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make_grader(name: str, key: str) -> Grader:
        made.append(name)
        return grading.make_grader(name, key)

    monkeypatch.setattr(try_again, "make_grader", make_grader)
    new_environment = environment_maker(CONFIG)
    one, other = new_environment(), new_environment()
    one.reset(PROMPT)
    other.reset(dataclasses.replace(PROMPT, text="11+11:", answer="022"))
    assert one.step("0+5=5,8+4=12>125").reward == 1.0
    assert other.step("0+5=5,8+4=12>125").reward == 0.0
    # A grader may be a process that takes seconds to start.
    assert made == ["column_addition"]


def test_a_prompt_without_an_answer_is_refused_where_it_stands() -> None:
    environment = environment_maker(CONFIG)()
    with pytest.raises(DataError, match=r"train\.jsonl:1"):
        environment.reset(dataclasses.replace(PROMPT, answer=None))


def test_an_unknown_grader_is_named() -> None:
    with pytest.raises(ConfigError, match=r"environment\.grader"):
        environment_maker(dataclasses.replace(CONFIG, grader="column_adition"))
