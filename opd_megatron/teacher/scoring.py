"""Rollouts to teacher scores: each is scored once, by prefill, by the teacher of its route.

Samples of one prompt go out next to each other, so that a server computes the prompt once (`serving/prefix.py`).
Calls of a teacher spread over its servers (`serving/pool.py`), a few in flight for each. Servers score at temperature
1; another teacher temperature needs the whole distribution (`temperature.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from opd_megatron.errors import ConfigError, did_you_mean
from opd_megatron.serving.batching import MAX_SEQUENCES, scoring_batches
from opd_megatron.serving.contract import ScoredResponse
from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.temperature import at_temperature
from opd_megatron.types import Rollout, TeacherScores

Result = TypeVar("Result")

# One call computes while the next one is being decoded and parsed.
_CALLS_IN_FLIGHT = 2


async def score_rollouts(
    teachers: Mapping[str, ServerPool],
    rollouts: Sequence[Rollout],
    routes: Sequence[str],
    *,
    topk: int = 0,
    aliases: Mapping[str, TokenAliases] | None = None,
    temperatures: Mapping[str, float] | None = None,
    sequences_per_call: int = MAX_SEQUENCES,
) -> list[TeacherScores]:
    """Score every rollout with the teacher that its route names.

    Args:
        teachers: the servers of each teacher, by name.
        rollouts: any order, any mix of prompts.
        routes: the teacher's name for each rollout.
        topk: K; 0 asks for the sampled tokens only.
        aliases: of each teacher, by name; a teacher that is not there has none.
        temperatures: of each teacher, by name; 1 where none is given.
        sequences_per_call: at most; fewer where the answer would be large (`serving/batching.py`).

    Returns:
        One `TeacherScores` per rollout, in the order of `rollouts`.

    Raises:
        ConfigError: a route names no teacher.
        ServerError, ContractError: a call failed; no score is returned.
    """
    by_teacher: dict[str, list[int]] = {}
    for position, (rollout, route) in enumerate(zip(rollouts, routes, strict=True)):
        if route not in teachers:
            known = ", ".join(sorted(teachers))
            raise ConfigError(
                f"teacher={route!r} of rollout {rollout.sample_id}: no such teacher"
                f"{did_you_mean(route, teachers)}; use one of: {known}"
            )
        by_teacher.setdefault(route, []).append(position)
    answers = await all_or_first_error(
        _score_with(
            teachers[name],
            [rollouts[i] for i in positions],
            topk,
            (aliases or {}).get(name, TokenAliases()),
            sequences_per_call,
        )
        for name, positions in by_teacher.items()
    )
    scores: dict[int, TeacherScores] = {}
    for (name, positions), scored in zip(by_teacher.items(), answers, strict=True):
        translate = (aliases or {}).get(name, TokenAliases()).as_student_reads
        temperature = (temperatures or {}).get(name, 1.0)
        if temperature != 1.0:
            vocab_size = teachers[name].clients[0].vocab_size
            scored = [at_temperature(one, temperature, vocab_size) for one in scored]
        for position, one in zip(positions, scored, strict=True):
            ids = None if one.topk_ids is None else translate(one.topk_ids)
            scores[position] = TeacherScores(
                name, one.logprobs, ids, one.topk_logprobs, server=one.server
            )
    return [scores[position] for position in range(len(rollouts))]


async def _score_with(
    servers: ServerPool,
    rollouts: Sequence[Rollout],
    topk: int,
    aliases: TokenAliases,
    sequences_per_call: int,
) -> list[ScoredResponse]:
    """Score rollouts with one teacher, in their order."""
    order = sorted(range(len(rollouts)), key=lambda position: rollouts[position].prompt_ids)
    lengths = [len(rollouts[position].response_ids) for position in order]
    calls = [
        [order[i] for i in batch] for batch in scoring_batches(lengths, topk, sequences_per_call)
    ]
    pending = iter(calls)
    scores: dict[int, ScoredResponse] = {}

    async def work() -> None:
        for call in pending:
            pairs = [
                (
                    rollouts[i].taught_prompt_ids,
                    aliases.as_teacher_reads(rollouts[i].response_ids, not rollouts[i].truncated),
                )
                for i in call
            ]
            scores.update(zip(call, await servers.score(pairs, topk), strict=True))

    await all_or_first_error(work() for _ in range(_CALLS_IN_FLIGHT * len(servers)))
    return [scores[position] for position in range(len(rollouts))]


async def all_or_first_error(jobs: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run jobs at once; the first error ends the others and is raised as it is, not in a group."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
