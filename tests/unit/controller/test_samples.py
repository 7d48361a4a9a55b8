"""What of a response may train, and what it earns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.schema import ObjectiveConfig, Recipe, TaskConfig
from opd_megatron.controller.samples import SampleMaker
from opd_megatron.controller.teaching import wanted_of
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.errors import ContractError
from opd_megatron.exchange.batch_file import read_index, read_whole, write_batch
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.in_process import unscored
from opd_megatron.types import Prompt, Rollout, Sample, TeacherScores

ENDOFTEXT, IM_START, IM_END = 1, 2, 3


@pytest.fixture(scope="module")
def demo() -> Recipe:
    return load_recipe("demo")[0]


@pytest.fixture(scope="module")
def tokenizer(demo: Recipe) -> ChatTokenizer:
    return load_chat_tokenizer(Path(demo.student.path))


def rollout(ids: tuple[int, ...], finish: str = "stop", number: int = 0) -> Rollout:
    logprobs = np.zeros(len(ids), np.float32)
    return Rollout(f"p@0#{number}", "p", (5,), ids, logprobs, finish, 0, 0, "rollout-0")


def scores(ids: tuple[int, ...]) -> TeacherScores:
    return TeacherScores("main", np.zeros(len(ids), np.float32))


def prompt(answer: str | None = None) -> Prompt:
    return Prompt("p", (5,), "1+1:", answer, None, "train.jsonl:1")


def trainable(maker: SampleMaker, ids: tuple[int, ...], finish: str = "stop") -> list[bool]:
    (sample,) = maker.make(prompt(), [rollout(ids, finish)], [scores(ids)])
    assert sample.trainable is not None
    return sample.trainable.tolist()


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("none", [True, True, True, True]),
        ("all", [True, False, False, False]),
        ("all_but_end", [True, False, False, True]),
    ],
)
def test_special_tokens_are_masked_as_the_recipe_says(
    demo: Recipe, tokenizer: ChatTokenizer, rule: str, wanted: list[bool]
) -> None:
    assert {ENDOFTEXT, IM_START, IM_END} <= tokenizer.special_ids
    recipe = replace(demo, objective=ObjectiveConfig(mask_special_tokens=rule))
    maker = SampleMaker(recipe, tokenizer, {})
    assert trainable(maker, (7, IM_START, ENDOFTEXT, IM_END)) == wanted


def test_an_aliased_token_inside_a_response_does_not_train(
    demo: Recipe, tokenizer: ChatTokenizer
) -> None:
    aliases = {"main": TokenAliases({ENDOFTEXT: IM_END, IM_END: ENDOFTEXT})}
    maker = SampleMaker(demo, tokenizer, aliases)
    assert trainable(maker, (7, ENDOFTEXT, 8, IM_END)) == [True, False, True, True]
    assert trainable(maker, (7, IM_END), finish="length") == [True, False]


def test_k_is_what_the_loss_needs_and_no_more_than_the_vocabulary(
    demo: Recipe, tokenizer: ChatTokenizer
) -> None:
    assert wanted_of(demo, tokenizer.vocab_size).topk == 0
    for topk, wanted in ((8, 8), (500, tokenizer.vocab_size)):
        objective = ObjectiveConfig(estimator="support_matching", topk=topk)
        recipe = replace(demo, objective=objective)
        assert wanted_of(recipe, tokenizer.vocab_size).topk == wanted


def test_a_graded_response_travels_with_its_reward(
    demo: Recipe, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    recipe = replace(demo, task=TaskConfig(coefficient=1.0, grader="exact_match"))
    maker = SampleMaker(recipe, tokenizer, {})
    seven = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode_token(i) == "7")
    right, wrong = (seven, IM_END), (seven, seven, IM_END)
    rollouts = [
        rollout(right),
        rollout(wrong, number=1),
        rollout(right[:1], finish="length", number=2),
    ]
    samples = maker.make(prompt("7"), rollouts, [scores(r.response_ids) for r in rollouts])
    assert [sample.reward for sample in samples] == [1.0, 0.0, 0.0]
    write_batch(tmp_path / "batch", 1, 0, samples)
    whole = read_whole(tmp_path / "batch")
    assert whole.rewards is not None and whole.rewards.tolist() == [1.0, 0.0, 0.0]
    assert whole.groups.tolist() == [0, 0, 0] and whole.trainable.all()
    with pytest.raises(ContractError, match="no answer to grade"):
        maker.make(prompt(None), rollouts[:1], [scores(right)])


def test_a_sample_without_scores_carries_nan_until_the_learner_fills_it(tmp_path: Path) -> None:
    first, second = rollout((5, 6, IM_END), number=0), rollout((7,), number=1)
    served = TeacherScores(
        "served",
        np.zeros(1, np.float32),
        np.ones((1, 2), np.int32),
        np.zeros((1, 2), np.float32),
    )
    samples = [Sample(first, unscored(first, "inside", topk=2)), Sample(second, served)]
    write_batch(tmp_path / "batch", 1, 0, samples)
    assert read_index(tmp_path / "batch").teachers == ("inside", "served")
    whole = read_whole(tmp_path / "batch", entropy_of=lambda rows: rows[:, 0])
    assert np.isnan(whole.teacher_logprobs).tolist() == [True, True, True, False]
    assert whole.teacher_entropy is not None
    assert np.isnan(whole.teacher_entropy).tolist() == [True, True, True, False]


def test_a_teacher_inside_the_learner_is_asked_for_no_topk(
    demo: Recipe, tokenizer: ChatTokenizer
) -> None:
    recipe = replace(demo, objective=ObjectiveConfig(estimator="support_matching", topk=4))
    assert wanted_of(recipe, tokenizer.vocab_size).topk == 4
    inside = replace(demo.teachers["main"], engine="in_process")
    assert wanted_of(replace(recipe, teachers={"main": inside}), tokenizer.vocab_size).topk == 0
