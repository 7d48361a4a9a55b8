"""Means of served teachers: exact where all was listed, inside their stated bounds where it was not."""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.teacher.joint import Listing, candidates, join, missing
from opd_megatron.teacher.mixing import mix
from opd_megatron.teacher.target import Target

L, V = 5, 12
WEIGHTS = {"arithmetic_mean": [0.5, 0.3, 0.2], "geometric_mean": [0.2, 0.7, 0.1]}
NAMES = ("a", "b", "c")
MEANS = tuple(WEIGHTS)


def distributions(seed: int = 0, scale: float = 2.0) -> np.ndarray:
    """[M, L, V] log-probs, float64."""
    logits = np.random.default_rng(seed).normal(size=(3, L, V)) * scale
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def textbook(mean: str, log_q_MLV: np.ndarray) -> np.ndarray:
    """[L, V] log-probs of the mean of whole distributions."""
    weights = np.asarray(WEIGHTS[mean])[:, None, None]
    if mean == "arithmetic_mean":
        return np.log((weights * np.exp(log_q_MLV)).sum(0))
    product = np.exp((weights * log_q_MLV).sum(0))
    return np.log(product / product.sum(-1, keepdims=True))


def target(mean: str) -> Target:
    return Target(mean, tuple(zip(NAMES, WEIGHTS[mean], strict=True)))


def listings(log_q_MLV: np.ndarray, sampled_L: np.ndarray, k: int) -> list[Listing]:
    made = []
    for log_q_LV in log_q_MLV:
        ids = np.argsort(-log_q_LV, axis=1)[:, :k]
        sampled = np.take_along_axis(log_q_LV, sampled_L[:, None], 1)[:, 0]
        made.append(Listing(sampled, ids, np.take_along_axis(log_q_LV, ids, 1)))
    return made


def answer(log_q_LV: np.ndarray, wanted_LJ: np.ndarray) -> np.ndarray:
    found = np.take_along_axis(log_q_LV, np.maximum(wanted_LJ, 0), 1)
    return np.where(wanted_LJ >= 0, found, np.nan)


@pytest.mark.parametrize("mean", MEANS)
def test_over_the_whole_vocabulary_a_mean_is_the_textbook_s(mean: str) -> None:
    log_q, sampled = distributions(), np.arange(L)
    everything = np.ones((L, V), dtype=np.bool_)
    sampled_ML = np.stack([q[np.arange(L), sampled] for q in log_q])
    mixed = mix(mean, WEIGHTS[mean], log_q, sampled_ML, everything)
    wanted = textbook(mean, log_q)
    np.testing.assert_allclose(mixed.logprobs_LJ, wanted, atol=1e-12)
    np.testing.assert_allclose(mixed.sampled_L, wanted[np.arange(L), sampled], atol=1e-12)
    assert mixed.error_L.max() <= 1e-9


@pytest.mark.parametrize("k", [1, 3, 6, 11])
def test_the_error_of_a_geometric_mean_is_within_its_bound_and_shrinks(k: int) -> None:
    for seed in range(30):
        log_q = distributions(seed)
        own = listings(log_q, np.arange(L), k)
        ids = candidates(own, None)
        asked = [answer(q, missing(ids, listing)) for q, listing in zip(log_q, own, strict=True)]
        joint = join(target("geometric_mean"), own, ids, asked, support="teacher_topk", topk=k)
        wanted = np.take_along_axis(textbook("geometric_mean", log_q), joint.ids_LJ, 1)
        off = np.abs(joint.logprobs_LJ - wanted)
        assert (off <= joint.error_L[:, None] + 1e-12).all()
        if k == 11:
            assert joint.error_L.max() < 0.05
        assert (joint.left_out_L == 0).all()


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize(
    "support", ["teacher_topk", "student_topk", "union", "symmetric_difference"]
)
def test_with_all_missing_tokens_asked_for_every_support_is_exact(mean: str, support: str) -> None:
    log_q, k = distributions(3), 4
    student = np.stack([np.random.default_rng(i).permutation(V)[:k] for i in range(L)])
    student_ids = None if support == "teacher_topk" else student
    own = listings(log_q, np.arange(L), V)
    ids = candidates(own, student_ids)
    joint = join(
        target(mean), own, ids, [None] * 3, support=support, topk=k, student_ids_LK=student_ids
    )
    wanted = textbook(mean, log_q)
    for row in range(L):
        top = set(np.argsort(-wanted[row])[:k].tolist())
        theirs = set(student[row].tolist())
        sets = {
            "teacher_topk": top,
            "student_topk": theirs,
            "union": top | theirs,
            "symmetric_difference": top ^ theirs,
        }
        found = joint.ids_LJ[row][joint.ids_LJ[row] >= 0].tolist()
        assert set(found) == sets[support] and len(found) == len(sets[support])
        np.testing.assert_allclose(
            joint.logprobs_LJ[row][: len(found)], wanted[row][found], atol=1e-6
        )
    assert joint.left_out_L.max() == 0.0
    assert joint.ids_LJ.shape[1] == (2 * k if support in ("union", "symmetric_difference") else k)


@pytest.mark.parametrize("mean", MEANS)
def test_what_a_larger_top_k_leaves_out_is_within_its_bound(mean: str) -> None:
    some = 0.0
    for seed in range(30):
        log_q = distributions(seed)
        own = listings(log_q, np.arange(L), 6)
        ids = candidates(own, None)
        joint = join(target(mean), own, ids, [None] * 3, support="teacher_topk", topk=3)
        wanted = np.exp(textbook(mean, log_q))
        wished = [set(np.concatenate([o.ids_LK[row, :3] for o in own])) for row in range(L)]
        for row in range(L):
            scored_by_all = set.intersection(*(set(o.ids_LK[row]) for o in own))
            gone = sum(wanted[row][i] for i in wished[row] - scored_by_all)
            assert gone <= joint.left_out_L[row] + 1e-12
            some = max(some, gone)
            kept = set(joint.ids_LJ[row][joint.ids_LJ[row] >= 0])
            assert kept <= scored_by_all
    assert some > 0.01, "nothing was ever left out, so nothing was shown"


def test_a_token_that_one_member_calls_impossible() -> None:
    log_q = distributions(1)
    log_q[0, :, 0] = -np.inf
    everything = np.ones((L, V), dtype=np.bool_)
    sampled = log_q[:, :, 0]
    arithmetic = mix("arithmetic_mean", WEIGHTS["arithmetic_mean"], log_q, sampled, everything)
    wanted = np.log(0.3 * np.exp(log_q[1, :, 0]) + 0.2 * np.exp(log_q[2, :, 0]))
    np.testing.assert_allclose(arithmetic.sampled_L, wanted, atol=1e-12)
    geometric = mix("geometric_mean", WEIGHTS["geometric_mean"], log_q, sampled, everything)
    assert (np.exp(geometric.sampled_L) == 0.0).all()
    assert np.isfinite(geometric.logprobs_LJ[:, 1:]).all()


def test_without_any_common_token_the_sampled_one_bounds_the_normaliser() -> None:
    log_q = distributions(2)
    nothing = np.zeros((L, V), dtype=np.bool_)
    sampled = log_q[:, :, 0]
    mixed = mix("geometric_mean", WEIGHTS["geometric_mean"], log_q, sampled, nothing)
    wanted = textbook("geometric_mean", log_q)[:, 0]
    assert (np.abs(mixed.sampled_L - wanted) <= mixed.error_L + 1e-12).all()
    assert np.isneginf(mixed.logprobs_LJ).all()
