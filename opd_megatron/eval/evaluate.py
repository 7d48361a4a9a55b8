"""Held-out evaluation through the servers that also train: mean@n accuracy and KL to the teacher.

Accuracy is over `samples_per_problem` responses of each problem, at the evaluation's own
temperature:

    mean       share of right responses (mean@n)
    best_of_n  share of problems with at least one right response

The KL is measured on the student's own responses, at temperature 1. For a vocabulary of at most
1024 both servers are asked for the whole distribution at every position, which makes it exact;
above that it is an estimate from the sampled tokens, and says so: an estimate of it only where
they were drawn at temperature 1 without truncation (`sample_rollouts`).

Left out: any decision. When to evaluate and what to do with the numbers is the controller's.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.eval.grading import Grader, check_answers
from opd_megatron.eval.kl import KlResult, dense_logprobs, exact_kl_result, sampled_kl_result
from opd_megatron.serving.batching import scoring_batches
from opd_megatron.serving.contract import Generation, ScoredResponse
from opd_megatron.serving.requests import Sampling
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.types import Prompt, Rollout

MAX_EXACT_VOCAB = (
    1024  # 4 KiB of log-probs per token and server; the demo has 32, real models 150,000
)

# Bounds what is generated again when a connection breaks.
SEQUENCES_PER_REQUEST = 128


class GeneratingClient(Protocol):
    """The part of `serving.pool.ServerPool` that accuracy needs."""

    async def generate(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, rids: Sequence[str]
    ) -> list[Generation]: ...


class ScoringClient(Protocol):
    """The part of `serving.pool.ServerPool` that the KL needs."""

    async def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], topk: int
    ) -> list[ScoredResponse]: ...


@dataclass(frozen=True)
class GradedSample:
    """One response and its verdict."""

    prompt_id: str
    prompt_text: str
    response_text: str
    right: bool
    truncated: bool


@dataclass(frozen=True)
class AccuracyResult:
    """What a model reached. Fractions in [0, 1], lengths in tokens (end token included)."""

    mean: float
    best_of_n: float
    truncated_frac: float
    len_mean: float
    num_problems: int
    samples: tuple[GradedSample, ...] = field(repr=False)
    rollouts: tuple[Rollout, ...] = field(repr=False)


async def evaluate_accuracy(
    client: GeneratingClient,
    prompts: Sequence[Prompt],
    tokenizer: ChatTokenizer,
    grader: Grader,
    sampling: Sampling,
    samples_per_problem: int,
    name: str,
) -> AccuracyResult:
    """Sample and grade.

    Args:
        prompts: the problems; each needs an answer.
        sampling: the client's sampling parameters (evaluation temperature, max_new_tokens).
        name: prefix of the request ids, unique for each evaluation, e.g. "eval-000050-student".

    Raises:
        DataError: a problem has no answer.
        ServerError, ContractError: from the client.
    """
    check_answers(prompts)
    problems = [prompt for prompt in prompts for _ in range(samples_per_problem)]
    rids = [
        f"{name}-{problem}-{sample}"
        for problem in range(len(prompts))
        for sample in range(samples_per_problem)
    ]
    generations = await _generate(client, [p.token_ids for p in problems], sampling, rids)
    # A grader may parse mathematics for seconds; the event loop must go on meanwhile.
    samples = await asyncio.to_thread(grade, problems, generations, tokenizer, grader)
    rollouts = [
        _as_rollout(rid, prompt, generation)
        for rid, prompt, generation in zip(rids, problems, generations, strict=True)
    ]
    return summarize(samples, rollouts)


async def sample_rollouts(
    client: GeneratingClient, prompts: Sequence[Prompt], sampling: Sampling, name: str
) -> list[Rollout]:
    """One response to each prompt, not graded.

    Args:
        name: as of `evaluate_accuracy`.
    """
    rids = [f"{name}-{number}" for number in range(len(prompts))]
    generations = await _generate(client, [p.token_ids for p in prompts], sampling, rids)
    return [_as_rollout(*one) for one in zip(rids, prompts, generations, strict=True)]


async def evaluate_kl(
    student: ScoringClient,
    teacher: ScoringClient,
    rollouts: Sequence[Rollout],
    vocab_size: int,
    aliases: TokenAliases | None = None,
) -> KlResult:
    """KL between student and teacher on the student's responses.

    Args:
        rollouts: of the student, at temperature 1, e.g. `AccuracyResult.rollouts`.
        vocab_size: of both models; up to `MAX_EXACT_VOCAB` the result is exact.
        aliases: of the teacher. Without the whole vocabulary, tokens it can not score are left out.

    Raises:
        ServerError, ContractError: from a client.
    """
    exact = vocab_size <= MAX_EXACT_VOCAB
    aliases = aliases or TokenAliases()
    sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    as_teacher_reads = [
        (r.taught_prompt_ids, aliases.as_teacher_reads(r.response_ids, not r.truncated))
        for r in rollouts
    ]
    topk = vocab_size if exact else 0
    student_scores, teacher_scores = await asyncio.gather(
        _score(student, sequences, topk), _score(teacher, as_teacher_reads, topk)
    )
    scores = list(zip(rollouts, student_scores, teacher_scores, strict=True))
    if not exact:
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for rollout, ours, theirs in scores:
            scored = ~aliases.unscorable(rollout.response_ids, not rollout.truncated)
            pairs.append((ours.logprobs[scored], theirs.logprobs[scored]))
        return sampled_kl_result(pairs)
    return exact_kl_result(
        [
            (_dense(ours, vocab_size, TokenAliases()), _dense(theirs, vocab_size, aliases))
            for _, ours, theirs in scores
        ]
    )


async def _generate(
    client: GeneratingClient,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    rids: Sequence[str],
) -> list[Generation]:
    """One response per prompt, in order, in requests of bounded size."""
    groups = await asyncio.gather(
        *(client.generate(prompts[part], sampling, rids[part]) for part in _parts(len(prompts)))
    )
    return [generation for group in groups for generation in group]


async def _score(
    client: ScoringClient,
    sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    topk: int,
) -> list[ScoredResponse]:
    """One score per sequence, in order, in requests whose answers are of bounded size."""
    batches = scoring_batches([len(response) for _, response in sequences], topk)
    groups = await asyncio.gather(
        *(client.score(sequences[batch.start : batch.stop], topk) for batch in batches)
    )
    return [score for group in groups for score in group]


def _parts(length: int) -> list[slice]:
    starts = range(0, length, SEQUENCES_PER_REQUEST)
    return [slice(start, start + SEQUENCES_PER_REQUEST) for start in starts]


def grade(
    problems: Sequence[Prompt],
    generations: Sequence[Generation],
    tokenizer: ChatTokenizer,
    grader: Grader,
) -> list[GradedSample]:
    """Grade one response for each entry of `problems`."""
    samples = []
    for prompt, generation in zip(problems, generations, strict=True):
        text = tokenizer.decode_response(generation.token_ids)
        truncated = generation.finish_reason == "length"
        right = grader(prompt.text, text, prompt.answer, not truncated)
        samples.append(GradedSample(prompt.id, prompt.text, text, right, truncated))
    return samples


def summarize(samples: Sequence[GradedSample], rollouts: Sequence[Rollout]) -> AccuracyResult:
    """Fractions over samples and problems; zeros for an empty evaluation."""
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        by_problem[sample.prompt_id].append(sample.right)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return AccuracyResult(
        mean=_mean([sample.right for sample in samples]),
        best_of_n=_mean([any(verdicts) for verdicts in by_problem.values()]),
        truncated_frac=_mean([sample.truncated for sample in samples]),
        len_mean=_mean(lengths),
        num_problems=len(by_problem),
        samples=tuple(samples),
        rollouts=tuple(rollouts),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _as_rollout(rid: str, prompt: Prompt, generation: Generation) -> Rollout:
    return Rollout(
        sample_id=rid,
        prompt_id=prompt.id,
        prompt_ids=tuple(prompt.token_ids),
        response_ids=generation.token_ids,
        behavior_logprobs=generation.logprobs,
        finish_reason=generation.finish_reason,
        version_first=generation.version_first,
        version_last=generation.version_last,
        server=generation.server,
        spans=generation.spans,
    )


def _dense(score: ScoredResponse, vocab_size: int, aliases: TokenAliases) -> np.ndarray:
    if score.topk_ids is None or score.topk_logprobs is None:  # an empty response
        return np.zeros((0, vocab_size))
    ids = aliases.as_student_reads(score.topk_ids)
    return dense_logprobs(ids, score.topk_logprobs, vocab_size)
