"""Held-out evaluation with several teachers: who is measured, on which answers, under which control text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.schema import Recipe
from opd_megatron.controller.evaluation import Evaluator
from opd_megatron.controller.probe import Probe
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.observe.metrics import checked
from opd_megatron.serving.contract import Generation, ScoredResponse
from opd_megatron.types import Prompt


class Pool:
    """Answers every prompt with the end token; `peak` is the log-odds of that token in its distribution."""

    def __init__(self, peak: float, end: int, vocab_size: int) -> None:
        logits = np.zeros(vocab_size)
        logits[end] = peak
        self.row = logits - np.log(np.exp(logits).sum())
        self.end = end
        self.generated: list[tuple[int, ...]] = []
        self.scored: list[tuple[int, ...]] = []
        self.plain: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return 1

    async def generate(
        self, prompts: Sequence[tuple[int, ...]], sampling: Any, rids: Sequence[str], topk: int = 0
    ) -> list[Generation]:
        self.generated += list(prompts)
        self.plain += list(prompts) if sampling.is_plain else []
        logprobs = self.row[[self.end]].astype(np.float32)
        return [Generation(rid, (self.end,), logprobs, "stop", 0, 0, "s") for rid in rids]

    async def score(self, sequences: Sequence[Any], topk: int) -> list[ScoredResponse]:
        self.scored += [prompt for prompt, _ in sequences]
        order = np.argsort(-self.row)[None, :topk].astype(np.int32)
        logprobs = self.row[order].astype(np.float32)
        sampled = self.row[[self.end]].astype(np.float32)
        return [ScoredResponse(sampled, 0, order, logprobs) for _ in sequences]


@pytest.fixture(scope="module")
def demo() -> Recipe:
    demo = load_recipe("demo")[0]
    path = demo.teachers["main"].path
    return apply_overrides(
        demo,
        [
            *(f"teachers.weak.path={path}", "evaluation.problems=3"),
            *("evaluation.samples_per_problem=2", "evaluation.kl_problems=2"),
        ],
    )


@pytest.fixture(scope="module")
def tokenizer(demo: Recipe) -> ChatTokenizer:
    return load_chat_tokenizer(Path(demo.student.path))


TEXTS = {"main": "1:", "weak": "22:"}
CONTROL = [
    "teaching.kind=control_token",
    *(f"teaching.control_texts.{name}='{text}'" for name, text in TEXTS.items()),
]


def scene(tokenizer: ChatTokenizer) -> tuple[Any, dict[str, Pool], list[Prompt]]:
    """Roles whose pools are all scripted, the pools by name, and three problems."""
    end, size = tokenizer.eos_ids[0], tokenizer.vocab_size
    pools = {
        name: Pool(peak, end, size) for name, peak in (("student", 1), ("main", 2), ("weak", 1))
    }
    roles = SimpleNamespace(
        rollout=pools["student"], teachers={name: pools[name] for name in ("main", "weak")}
    )
    return roles, pools, [Prompt(f"p{i}", (4 + i, 5), "1+1:", "2", None, "f") for i in range(3)]


def evaluate(
    recipe: Recipe, tokenizer: ChatTokenizer, with_teacher: bool = True
) -> tuple[dict[str, float], dict[str, Pool]]:
    roles, pools, prompts = scene(tokenizer)
    evaluator = Evaluator(recipe, roles, tokenizer, prompts, {})
    return asyncio.run(evaluator.evaluate(with_teacher)), pools


def test_every_teacher_is_measured_and_one_gives_the_unmarked_series(
    demo: Recipe, tokenizer: ChatTokenizer
) -> None:
    metrics, pools = evaluate(demo, tokenizer)
    assert checked(metrics) == metrics
    assert metrics["eval/heldout/kl_reverse_to/weak"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/heldout/kl_reverse_to/main"] > 0.01
    assert metrics["eval/heldout/kl_reverse"] == metrics["eval/heldout/kl_reverse_to/main"]
    assert {"eval/heldout/accuracy_of/main", "eval/heldout/accuracy_of/weak"} <= set(metrics)
    assert not any("accuracy_as" in name for name in metrics)
    assert len(pools["student"].generated) == 6, "one set of answers for all teachers"
    other, _ = evaluate(apply_overrides(demo, ["evaluation.teacher=weak"]), tokenizer, False)
    assert other["eval/heldout/kl_reverse"] == other["eval/heldout/kl_reverse_to/weak"]
    assert not any("accuracy_of" in name or "teacher_accuracy" in name for name in other)


def test_one_teacher_alone_has_no_series_of_its_own(demo: Recipe, tokenizer: ChatTokenizer) -> None:
    alone = load_recipe("demo")[0]
    metrics, _ = evaluate(apply_overrides(alone, ["evaluation.problems=3"]), tokenizer)
    assert not any("/main" in name for name in metrics)
    assert "eval/heldout/kl_reverse" in metrics and "eval/heldout/teacher_accuracy" in metrics


def test_the_student_answers_under_each_control_text_and_teachers_never_see_one(
    demo: Recipe, tokenizer: ChatTokenizer
) -> None:
    metrics, pools = evaluate(apply_overrides(demo, CONTROL), tokenizer)
    assert {f"eval/heldout/accuracy_as/{name}" for name in TEXTS} <= set(metrics)
    assert metrics["eval/heldout/accuracy"] == metrics["eval/heldout/accuracy_as/main"]
    check_who_read_what(tokenizer, pools)


@pytest.mark.parametrize("settings", [["evaluation.temperature=0.7"], ["evaluation.top_p=0.9"], []])
def test_an_estimated_kl_is_of_tokens_drawn_plainly(
    demo: Recipe, tokenizer: ChatTokenizer, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("controller.evaluation", "eval.evaluate"):
        monkeypatch.setattr(f"opd_megatron.{module}.MAX_EXACT_VOCAB", tokenizer.vocab_size - 1)
    metrics, pools = evaluate(apply_overrides(demo, settings), tokenizer)
    student, main = pools["student"], pools["main"]
    drawn = [(4, 5), (5, 5)]
    assert len(student.generated) == 6 + (2 if settings else 0)
    assert student.plain == (drawn if settings else student.generated)
    # Every answer of the script is the end token.
    assert main.scored == (drawn if settings else [one for one in drawn for _ in range(2)])
    wanted = student.row[student.end] - main.row[main.end]
    assert metrics["eval/heldout/kl_reverse"] == pytest.approx(wanted, abs=1e-6)
    assert "eval/heldout/kl_forward" not in metrics


def check_who_read_what(tokenizer: ChatTokenizer, pools: dict[str, Pool]) -> None:
    """The student every problem under every text, the teachers the problems alone."""
    plain = {(4 + i, 5) for i in range(3)}
    prefixes = [tokenizer.encode_text(text) for text in TEXTS.values()]
    assert set(pools["student"].generated) == {p + one for p in prefixes for one in plain}
    for name in TEXTS:
        assert set(pools[name].scored) | set(pools[name].generated) <= plain
    assert not set(pools["student"].scored) & plain


def test_a_probe_asks_the_student_as_it_will_train(demo: Recipe, tokenizer: ChatTokenizer) -> None:
    recipe = apply_overrides(demo, [*CONTROL, "preflight.probe_rollouts=2"])
    roles, pools, prompts = scene(tokenizer)
    probe = Probe(recipe, roles, tokenizer, {}, prompts, prompts, None)
    student, rows = asyncio.run(probe.run())
    check_who_read_what(tokenizer, pools)
    assert {row.name: row.num_tokens for row in rows} == {"main": 6, "weak": 6}
    by_name = {row.name: row for row in rows}
    assert by_name["weak"].reverse_kl == pytest.approx(0.0, abs=1e-6)
    assert by_name["main"].reverse_kl is not None and by_name["main"].reverse_kl > 0.01
    assert student.accuracy is not None and student.num_tokens == 6
