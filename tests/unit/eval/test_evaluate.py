"""Evaluation over a client: which request belongs to which problem, and what the numbers mean."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.demo.tokenizer import IM_END, encode_prompt, encode_text, save_tokenizer
from opd_megatron.errors import DataError, ServerError
from opd_megatron.eval.evaluate import (
    SEQUENCES_PER_REQUEST,
    AccuracyResult,
    evaluate_accuracy,
    evaluate_kl,
)
from opd_megatron.eval.grading import make_grader
from opd_megatron.serving.contract import Generation, ScoredResponse
from opd_megatron.serving.requests import Sampling
from opd_megatron.types import Prompt, Rollout

SAMPLING = Sampling(temperature=1.0, max_new_tokens=20)


class ScriptedServer:
    """Answers every prompt with texts in turn (None: a cut response); scores from a table."""

    name = "scripted"

    def __init__(self, texts: Sequence[str | None], logprobs_V: np.ndarray | None = None) -> None:
        self.texts = texts
        self.logprobs_V = logprobs_V
        self.rids: list[str] = []

    async def generate(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, rids: Sequence[str]
    ) -> list[Generation]:
        self.rids += rids
        return [self._one(rid) for rid, _ in zip(rids, prompts, strict=True)]

    def _one(self, rid: str) -> Generation:
        text = self.texts[int(rid.rsplit("-", 1)[1]) % len(self.texts)]
        ids = encode_text("9" * 20) if text is None else [*encode_text(text), IM_END]
        reason = "length" if text is None else "stop"
        logprobs = np.zeros(len(ids), dtype=np.float32)
        return Generation(f"{rid}/0", tuple(ids), logprobs, reason, 5, 5, "s")

    async def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], topk: int
    ) -> list[ScoredResponse]:
        assert self.logprobs_V is not None
        order = np.argsort(-self.logprobs_V)[:topk].astype(np.int32)
        scores = []
        for _, response in sequences:
            sampled = self.logprobs_V[list(response)].astype(np.float32)
            ids = np.tile(order, (len(response), 1))
            top = self.logprobs_V[ids].astype(np.float32)
            scores.append(ScoredResponse(sampled, 5, ids, top))
        return scores


class BrokenServer(ScriptedServer):
    async def generate(self, *_: object) -> list[Generation]:  # type: ignore[override]
        raise ServerError("gone")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    directory: Path = tmp_path_factory.mktemp("model")
    save_tokenizer(directory, context_length=64)
    (directory / "config.json").write_text('{"vocab_size": 32, "eos_token_id": 3}')
    return load_chat_tokenizer(directory)


def problem(text: str, answer: str | None) -> Prompt:
    return Prompt(text, tuple(encode_prompt(text)), text, answer, None, "heldout.jsonl:1")


def run(
    server: ScriptedServer, prompts: Sequence[Prompt], tokenizer: ChatTokenizer, num_samples: int
) -> AccuracyResult:
    grader = make_grader("exact_match")
    return asyncio.run(
        evaluate_accuracy(server, prompts, tokenizer, grader, SAMPLING, num_samples, "eval-0")
    )


def test_accuracy_counts_samples_and_best_counts_problems(tokenizer: ChatTokenizer) -> None:
    server = ScriptedServer(["125", "7", None, "126"])
    prompts = [problem("40+85:", "125"), problem("1+6:", "7"), problem("1+1:", "2")]
    result = run(server, prompts, tokenizer, 4)
    assert result.mean == 2 / 12
    assert result.best_of_n == 2 / 3
    assert result.truncated_frac == 0.25
    assert result.len_mean == (4 + 2 + 20 + 4) / 4
    assert result.num_problems == 3


def test_rollouts_keep_prompt_ids_versions_and_our_request_names(tokenizer: ChatTokenizer) -> None:
    result = run(ScriptedServer(["7"]), [problem("1+6:", "7")], tokenizer, 2)
    rollout = result.rollouts[1]
    assert (rollout.sample_id, rollout.prompt_id, rollout.server) == (
        "eval-0-0-1",
        "1+6:",
        "s",
    )
    assert rollout.prompt_ids == tuple(encode_prompt("1+6:"))
    assert (rollout.version_first, rollout.finish_reason) == (5, "stop")
    assert [sample.response_text for sample in result.samples] == ["7", "7"]


def test_many_samples_go_in_bounded_requests_with_unique_names(tokenizer: ChatTokenizer) -> None:
    server = ScriptedServer(["7"])
    result = run(server, [problem(f"{i}+1:", "7") for i in range(50)], tokenizer, 8)
    assert len(set(server.rids)) == 400 > SEQUENCES_PER_REQUEST
    assert [rollout.sample_id for rollout in result.rollouts] == server.rids
    assert result.mean == 1.0


def test_missing_answer_stops_before_anything_is_asked(tokenizer: ChatTokenizer) -> None:
    server = ScriptedServer(["7"])
    with pytest.raises(DataError, match="has no answer"):
        run(server, [problem("1+6:", None)], tokenizer, 2)
    assert server.rids == []


def test_server_error_reaches_the_caller(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ServerError, match="gone"):
        run(BrokenServer([]), [problem("1+6:", "7")], tokenizer, 2)


def rollouts_of(lengths: Sequence[int]) -> list[Rollout]:
    zeros = np.zeros(0, dtype=np.float32)
    return [
        Rollout(f"s{i}", "p", (1, 2), (3,) * length, zeros, "stop", 0, 0, "rollout-0")
        for i, length in enumerate(lengths)
    ]


def logprobs(vocab_size: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=vocab_size)
    return logits - np.log(np.exp(logits).sum())


def test_small_vocabulary_gives_the_exact_kl() -> None:
    p, q = logprobs(32, 0), logprobs(32, 1)
    student, teacher = ScriptedServer([], p), ScriptedServer([], q)
    result = asyncio.run(evaluate_kl(student, teacher, rollouts_of([4, 0, 9]), 32))
    assert result.exact
    assert result.num_tokens == 13
    assert result.reverse == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-5)
    assert result.forward == pytest.approx((np.exp(q) * (q - p)).sum(), rel=1e-5)


def test_large_vocabulary_gives_an_estimate_from_sampled_tokens() -> None:
    p, q = logprobs(2000, 0), logprobs(2000, 1)
    student, teacher = ScriptedServer([], p), ScriptedServer([], q)
    result = asyncio.run(evaluate_kl(student, teacher, rollouts_of([4]), 2000))
    assert (result.exact, result.forward) == (False, None)
    assert result.reverse == pytest.approx(p[3] - q[3], rel=1e-5)
