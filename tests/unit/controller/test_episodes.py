"""Conversations become samples: what the student wrote trains, what the environment wrote is masked everywhere."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.rules import problems
from opd_megatron.config.schema import EnvironmentConfig, ObjectiveConfig, TaskConfig
from opd_megatron.controller.episodes import Conversations
from opd_megatron.controller.records import age_metrics, colored_rollout, length_metrics
from opd_megatron.controller.samples import SampleMaker
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.errors import ContractError
from opd_megatron.eval.grading import make_grader
from opd_megatron.exchange.batch_file import read_index, read_whole, write_batch
from opd_megatron.exchange.staleness import check_staleness
from opd_megatron.losses.settings import LISTED_SUPPORTS
from opd_megatron.serving.contract import Generation
from opd_megatron.serving.requests import Sampling
from opd_megatron.types import Prompt, Rollout, Sample, TeacherScores

IM_START, IM_END = 2, 3
WRONG, RIGHT = "0+5=5,8+4=12>124", "0+5=5,8+4=12>125"
SAMPLING = Sampling(temperature=1.0, max_new_tokens=20)
CONFIG = EnvironmentConfig(
    name="try_again", grader="column_addition", max_turns=3, max_observation_tokens=8
)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_chat_tokenizer(Path(load_recipe("demo")[0].student.path))


def ids_of(tokenizer: ChatTokenizer, text: str) -> tuple[int, ...]:
    """Of plain text of this tokenizer, in which a character is a token."""
    return tokenizer.encode_messages([{"role": "user", "content": text}])[1:]


class Script:
    """A pool whose student says one entry after the other: (text, version, whether it was cut)."""

    def __init__(self, tokenizer: ChatTokenizer, *turns: tuple[str, int, bool]) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)
        self.prompts: list[tuple[int, ...]] = []
        self.rids: list[str] = []
        self.wished: list[str] = []

    async def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        _: Sampling,
        rids: Sequence[str],
        *,
        stay_with: str,
    ) -> list[Generation]:
        self.prompts += prompts
        self.rids += rids
        self.wished.append(stay_with)
        text, version, is_cut = self.turns.pop(0)
        ids = ids_of(self.tokenizer, text)
        ids = ids if is_cut else (*ids, IM_END)
        logprobs = np.full(len(ids), -0.5, np.float32)
        reason = "length" if is_cut else "stop"
        return [Generation("r", ids, logprobs, reason, version, version, "rollout-0")]


def prompt(tokenizer: ChatTokenizer) -> Prompt:
    asked = tokenizer.encode_messages([{"role": "user", "content": "40+85:"}])
    return Prompt("p", asked, "40+85:", "125", "math", "train.jsonl:1")


def play(tokenizer: ChatTokenizer, script: Any, config: EnvironmentConfig = CONFIG) -> Rollout:
    asked = prompt(tokenizer)
    conversations = Conversations(tokenizer, config)
    (rollout,) = asyncio.run(conversations.generate(script, asked, SAMPLING, ["p@0#0"], 1))
    return rollout


def test_a_conversation_is_one_sequence_in_which_every_turn_stays_as_it_was_sampled(
    tokenizer: ChatTokenizer,
) -> None:
    script = Script(tokenizer, (WRONG, 4, False), (RIGHT, 4, False))
    rollout = play(tokenizer, script)
    asked = prompt(tokenizer).token_ids
    first = (*ids_of(tokenizer, WRONG), IM_END)
    second = (*ids_of(tokenizer, RIGHT), IM_END)
    assert rollout.response_ids == (*first, *asked, *second)
    assert rollout.given == ((len(first), len(first) + len(asked)),)
    assert rollout.sampled.tolist() == [True] * len(first) + [False] * 7 + [True] * len(second)
    assert script.prompts == [asked, (*asked, *first, *asked)]
    assert len(set(script.rids)) == 2
    assert script.wished == ["", "rollout-0"], "the conversation is in that server's cache"
    assert (rollout.reward, rollout.finish_reason, rollout.spans) == (1.0, "stop", ())


def test_turns_of_different_versions_keep_them(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rollout = play(tokenizer, Script(tokenizer, (WRONG, 4, False), (RIGHT, 6, False)))
    assert rollout.spans == ((4, 24), (6, 41))
    assert rollout.token_versions.tolist() == [4] * 17 + [-1] * 7 + [6] * 17
    with pytest.raises(ContractError, match="by weight version 3 after one by 4"):
        play(tokenizer, Script(tokenizer, (WRONG, 4, False), (RIGHT, 3, False)))


def test_an_episode_ends_with_a_cut_turn_and_with_the_last_one(tokenizer: ChatTokenizer) -> None:
    cut = play(tokenizer, Script(tokenizer, (WRONG, 0, False), ("0+5", 0, True)))
    assert cut.truncated and len(cut.given) == 1 and cut.reward == 0.0
    wrong = [(WRONG, 0, False)] * 3
    last = play(tokenizer, Script(tokenizer, *wrong))
    assert len(last.given) == 2 and last.reward == 0.0
    assert last.response_ids[-1] == IM_END, "nothing is observed after the last turn"


def test_an_observation_that_is_too_long_is_refused(tokenizer: ChatTokenizer) -> None:
    short = EnvironmentConfig(
        name="try_again", grader="column_addition", max_turns=2, max_observation_tokens=6
    )
    with pytest.raises(ContractError, match="an observation of 7 tokens"):
        play(tokenizer, Script(tokenizer, (WRONG, 0, False)), short)


def test_what_the_environment_wrote_never_trains_and_has_no_age(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    recipe = apply_overrides(load_recipe("demo")[0], ["task.coefficient=1.0"])
    assert recipe.task == TaskConfig(coefficient=1.0) and recipe.objective == ObjectiveConfig()
    maker = SampleMaker(recipe, tokenizer, {})
    rollout = play(tokenizer, Script(tokenizer, (WRONG, 4, False), (RIGHT, 5, False)))
    scores = TeacherScores("math", np.full(len(rollout.response_ids), -1.0, np.float32))
    (sample,) = maker.make(prompt(tokenizer), [rollout], [scores])
    assert sample.trainable is not None
    assert sample.trainable.tolist() == rollout.sampled.tolist()
    assert sample.reward == 1.0, "the environment's, not a grade of the whole text"
    write_batch(tmp_path / "batch", 6, 5, [sample])
    index, whole = read_index(tmp_path / "batch"), read_whole(tmp_path / "batch")
    check_staleness(index, 5, 1)
    assert (whole.token_versions >= 0).tolist() == rollout.sampled.tolist()
    assert age_metrics([sample], 5)["offpolicy/token_age_mean"] == 0.5
    lengths = length_metrics([sample])
    assert (lengths["rollout/len_mean"], lengths["rollout/turns_mean"]) == (34.0, 2.0)


def test_a_shown_conversation_is_right_when_its_environment_says_so(
    tokenizer: ChatTokenizer,
) -> None:
    grader = make_grader("column_addition")
    for last, right in ((RIGHT, True), (WRONG, False)):
        rollout = play(tokenizer, Script(tokenizer, (WRONG, 4, False), *[(last, 4, False)] * 2))
        zeros = np.zeros(len(rollout.response_ids), np.float32)
        sample = Sample(rollout, TeacherScores("math", zeros))
        shown = colored_rollout(1, 0, [sample], prompt(tokenizer), zeros, zeros, tokenizer, grader)
        assert shown.correct is right


def test_rules_of_conversations_name_the_fix() -> None:
    demo = load_recipe("demo")[0]
    turns = ["environment.name=try_again", "environment.max_turns=2"]
    (found,) = problems(apply_overrides(demo, ["environment.max_turns=2"]))[-1:]
    assert "set environment.name, or environment.max_turns=1" in found
    (found, *_) = problems(apply_overrides(demo, [*turns, "environment.max_observation_tokens=12"]))
    assert "2 times rollout.max_new_tokens=20 and 1 times" in found
    assert "lower rollout.max_new_tokens to 19" in found
    fits = ["environment.max_observation_tokens=10", "rollout.max_new_tokens=20"]
    assert problems(apply_overrides(demo, [*turns, *fits])) == []
    for support in (
        "student_topk",
        "union",
        "symmetric_difference",
        "intersection",
        "teacher_topk",
    ):
        matching = ["objective.estimator=support_matching", f"objective.support={support}"]
        found = problems(apply_overrides(demo, [*turns, *fits, *matching]))
        asked = support in LISTED_SUPPORTS
        assert any("comes with a rollout of one turn" in problem for problem in found) == asked
    teacher = dataclasses.replace(demo.teachers["main"], aliases={"a": "b"})
    aliased = dataclasses.replace(
        apply_overrides(demo, [*turns, *fits]), teachers={"main": teacher}
    )
    assert any("leave the aliases out" in problem for problem in problems(aliased))
