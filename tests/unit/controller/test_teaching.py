"""What a run makes of its teachers: control texts, places for scores, shares of the tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.schema import Recipe
from opd_megatron.controller.teaching import Teaching, data_config, teaching_metrics
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.errors import ConfigError
from opd_megatron.observe.metrics import checked
from opd_megatron.types import Prompt, Rollout, Sample, TeacherScores

TEXTS = {"main": "1:", "weak": "22:"}


@pytest.fixture(scope="module")
def control() -> Recipe:
    demo = load_recipe("demo")[0]
    path = demo.teachers["main"].path
    texts = [f"teaching.control_texts.{name}='{text}'" for name, text in TEXTS.items()]
    return apply_overrides(
        demo, [f"teachers.weak.path={path}", "teaching.kind=control_token", *texts]
    )


@pytest.fixture(scope="module")
def tokenizer(control: Recipe) -> ChatTokenizer:
    return load_chat_tokenizer(Path(control.student.path))


def teaching(recipe: Recipe, tokenizer: ChatTokenizer) -> Teaching:
    nobody: Any = None  # no server is asked here
    return Teaching(recipe, nobody, tokenizer, {})


def sample(target: str, length: int, **scores: Any) -> Sample:
    nothing = np.zeros(length, np.float32)
    rollout = Rollout("p#0", "p", (1, 2, 3), (5,) * length, nothing, "stop", 0, 0, "r")
    return Sample(rollout, TeacherScores(target, nothing, **scores))


def test_the_student_reads_a_control_text_that_its_teacher_does_not(
    control: Recipe, tokenizer: ChatTokenizer
) -> None:
    made = teaching(control, tokenizer)
    prompt = Prompt("p", tokenizer.encode_text("40+85:"), "40+85:", "125", None, "f:1")
    seen: dict[str, tuple[int, ...]] = {}
    for position in range(40):
        target = made.target(prompt, position, 0)
        asked, count = made.prompt_for(prompt, position, 0)
        seen[target.name] = asked.token_ids
        nothing = np.zeros(1, np.float32)
        rollout = Rollout(
            "p#0", "p", asked.token_ids, (5,), nothing, "stop", 0, 0, "r", num_control=count
        )
        assert rollout.taught_prompt_ids == prompt.token_ids
    for name, text in TEXTS.items():
        assert seen[name] == tokenizer.encode_text(text) + prompt.token_ids


def test_a_row_that_names_its_teacher_has_that_one_s_control_text(
    control: Recipe, tokenizer: ChatTokenizer
) -> None:
    made = teaching(control, tokenizer)
    prompt = Prompt("p", (7,), "", None, "weak", "f:1")
    for position in range(10):
        asked, count = made.prompt_for(prompt, position, 0)
        assert asked.token_ids[:count] == tokenizer.encode_text(TEXTS["weak"])


def test_the_prompt_limit_leaves_room_for_the_longest_control_text(
    control: Recipe, tokenizer: ChatTokenizer
) -> None:
    longest = max(len(tokenizer.encode_text(text)) for text in TEXTS.values())
    limit = control.data.max_prompt_tokens
    assert data_config(control, tokenizer).max_prompt_tokens == limit - longest
    tight = replace(control, data=replace(control.data, max_prompt_tokens=longest))
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens"):
        data_config(tight, tokenizer)
    odd = apply_overrides(control, ["teaching.control_texts.weak=hello"])
    with pytest.raises(ConfigError, match=r"teaching\.control_texts"):
        data_config(odd, tokenizer)


def test_shares_count_tokens_by_weight_and_bounds_are_reported() -> None:
    samples = [
        sample("main", 6),
        sample("arithmetic_mean(main=0.25,weak=0.75)", 4),
        sample(
            "weak",
            2,
            left_out=np.asarray([0.0, 0.5], np.float32),
            error_nats=np.asarray([0.0, 0.1], np.float32),
        ),
    ]
    metrics = teaching_metrics(samples, ("main", "weak", "late"))
    assert metrics["teacher/share/main"] == pytest.approx(7 / 12)
    assert metrics["teacher/share/weak"] == pytest.approx(5 / 12)
    assert metrics["teacher/share/late"] == 0.0
    assert metrics["teacher/left_out_mass"] == pytest.approx(0.25)
    assert metrics["teacher/error_nats_max"] == pytest.approx(0.1)
    assert checked(metrics) == metrics


def test_one_teacher_has_no_share() -> None:
    assert teaching_metrics([sample("main", 3)], ("main",)) == {}
