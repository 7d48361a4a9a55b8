"""Targets on every support and route, by a real server against `transformers` over the whole vocabulary.

One server plays two teachers: the second one has an alias, which makes its distribution another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny_servers import VOCAB, reference_logprobs

from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.routes import Route
from opd_megatron.teacher.target import Target
from opd_megatron.teacher.target_scoring import Wanted, score_target
from opd_megatron.types import Rollout, TeacherScores

K = 6
SWAPS = {40: 41, 41: 40}
ALIASES = {"swapped": TokenAliases(SWAPS)}
ROUTES = {
    "whole": Route("whole", VOCAB, 0, 0),
    "listed": Route("listed", K, 3, 0),
    "larger_topk": Route("larger_topk", 3 * K, 0, 0),
}
TARGETS = (
    Target.one("plain"),
    Target.of("arithmetic_mean", {"plain": 1.0, "swapped": 2.0}),
    Target.of("geometric_mean", {"plain": 0.3, "swapped": 0.7}),
)
SUPPORTS = ("teacher_topk", "student_topk", "union", "symmetric_difference")


@dataclass(frozen=True)
class Checked:
    """Largest errors in nats beyond what the scores state; mass beyond the stated bound; how often each occurred."""

    beyond_error: float
    beyond_left_out: float
    exact_error: float
    left_out: float
    student_ids_differ: int
    num_tokens: int


async def check_targets(
    client: SglangClient, prompts: tuple[tuple[int, ...], ...], model: Path
) -> Checked:
    """Let the server's model write with its top-K, then score every target on every support and route."""
    rids = [f"target-{i}" for i in range(len(prompts))]
    sampling = Sampling(temperature=1.0, max_new_tokens=10)
    generations = await client.generate(prompts, sampling, rids, K)
    rollouts = [
        Rollout(
            rid, rid, prompt, g.token_ids, g.logprobs, g.finish_reason, 7, 7, client.name,
            topk_ids=g.topk_ids,
        )
        for rid, prompt, g in zip(rids, prompts, generations, strict=True)
    ]  # fmt: skip
    tables = [reference_logprobs(model, r.prompt_ids + r.response_ids) for r in rollouts]
    rows = [t[len(r.prompt_ids) - 1 :] for t, r in zip(tables, rollouts, strict=True)]
    differ = sum(
        int((np.argsort(-t, axis=1)[:, :K] != r.topk_ids).sum())
        for t, r in zip(rows, rollouts, strict=True)
    )
    pools = {
        name: ServerPool(name, [client], return_timeout_s=5, say=print)
        for name in ("plain", "swapped")
    }
    version = (await client.model_info()).weight_version
    for pool in pools.values():
        pool.admit(client, version)
    seen = [0.0] * 4
    for target in TARGETS:
        for kind, route in ROUTES.items():
            for support in SUPPORTS:
                wanted = Wanted(support, K, route)
                scored = await score_target(pools, target, rollouts, wanted, ALIASES)
                for scores, table, rollout in zip(scored, rows, rollouts, strict=True):
                    found = _errors(scores, _mixture(target, table), rollout, kind, support)
                    seen = [max(a, b) for a, b in zip(seen, found, strict=True)]
    for pool in pools.values():
        await pool.close()
    num_tokens = sum(len(r.response_ids) for r in rollouts)
    return Checked(seen[0], seen[1], seen[2], seen[3], differ, num_tokens)


def _mixture(target: Target, log_q_LV: np.ndarray) -> np.ndarray:
    swapped = log_q_LV.copy()
    swapped[:, list(SWAPS)] = log_q_LV[:, list(SWAPS.values())]
    members = {"plain": log_q_LV, "swapped": swapped}
    if not target.mean:
        return members[target.name]
    if target.mean == "arithmetic_mean":
        return np.log(sum(w * np.exp(members[name]) for name, w in target.weights))
    product = np.exp(sum(w * members[name] for name, w in target.weights))
    return np.log(product / product.sum(1, keepdims=True))


def _errors(
    scores: TeacherScores, wanted_LV: np.ndarray, rollout: Rollout, kind: str, support: str
) -> tuple[float, float, float, float]:
    """Beyond the stated error; beyond the stated left-out mass; error on exact routes; the left-out mass itself."""
    assert scores.topk_ids is not None and scores.topk_logprobs is not None
    length = len(wanted_LV)
    zeros = np.zeros(length)
    error = zeros if scores.error_nats is None else scores.error_nats
    left_out = zeros if scores.left_out is None else scores.left_out
    # A token with an alias inside a response is another one to the second teacher, and never trains.
    clean = ~np.isin(rollout.response_ids, list(SWAPS))
    sampled = np.abs(
        scores.sampled_logprobs - wanted_LV[np.arange(length), list(rollout.response_ids)]
    )
    valid = scores.topk_ids >= 0
    exact = np.take_along_axis(wanted_LV, np.maximum(scores.topk_ids, 0).astype(np.int64), 1)
    off = np.where(valid, np.abs(scores.topk_logprobs - exact), 0.0).max(axis=1)
    off = np.maximum(off, np.where(clean, sampled, 0.0))
    gone = zeros
    if support == "student_topk" and rollout.topk_ids is not None:
        missing = ~(rollout.topk_ids[:, :, None] == scores.topk_ids[:, None, :]).any(axis=2)
        mass = np.exp(np.take_along_axis(wanted_LV, rollout.topk_ids.astype(np.int64), 1))
        gone = (mass * missing).sum(axis=1)
    on_exact_route = off.max() if kind != "larger_topk" and error.max() < 1e-6 else 0.0
    return (
        float((off - error).max()),
        float((gone - left_out).max()),
        float(on_exact_route),
        float(left_out.max()),
    )
