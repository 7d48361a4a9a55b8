"""Targets of served teachers end to end, against teachers whose whole distribution is a table.

The pool answers as a server does (its own top-K, one list for a piece), so what is tested is which tokens are
asked for, of whom, and what is made of the answers. Real servers: tests/real/test_served_supports.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.schema import ObjectiveConfig, Recipe, TeacherConfig, TeachingConfig
from opd_megatron.errors import ConfigError
from opd_megatron.serving.contract import ScoredResponse
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.routes import Route, choose_route, route_of
from opd_megatron.teacher.target import Target
from opd_megatron.teacher.target_scoring import Wanted, score_target
from opd_megatron.types import Rollout, TeacherScores

V, K = 40, 4


class Table:
    """A teacher: the distribution after a context depends on its tokens. Counts what it was asked.

    A piece that comes to another of its servers than the one that scored the response fails.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.asked: list[int] = []
        self.listed = 0

    def __len__(self) -> int:
        return 1

    def row(self, context: Sequence[int]) -> np.ndarray:
        generator = np.random.default_rng([self.seed, len(context), *context])
        logits = generator.normal(size=V) * 2
        return logits - np.log(np.exp(logits).sum())

    def rows(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        whole = [*prompt, *response]
        return np.stack([self.row(whole[: len(prompt) + t]) for t in range(len(response))])

    async def score(self, sequences: Sequence[Any], topk: int) -> list[ScoredResponse]:
        self.asked.append(topk)
        made = []
        for prompt, response in sequences:
            rows = self.rows(prompt, response)
            ids = np.argsort(-rows, axis=1)[:, :topk].astype(np.int32)
            best = np.take_along_axis(rows, ids, 1).astype(np.float32)
            sampled = rows[np.arange(len(response)), list(response)].astype(np.float32)
            lists = (ids, best) if topk else (None, None)
            made.append(ScoredResponse(sampled, 0, *lists, server=self.home(prompt)))
        return made

    @staticmethod
    def home(prompt: Sequence[int]) -> str:
        return f"server-{prompt[1]}"

    async def score_listed(
        self, sequences: Sequence[Any], listed: Sequence[tuple[int, ...]], stay_with: str
    ) -> list[ScoredResponse]:
        made = []
        for (prompt, response), ids in zip(sequences, listed, strict=True):
            assert stay_with == self.home(prompt), "nobody else has the response in its cache"
            rows = self.rows(prompt, response)
            sampled = rows[np.arange(len(response)), list(response)].astype(np.float32)
            values = rows[:, list(ids)].astype(np.float32)
            self.listed += values.size
            made.append(ScoredResponse(sampled, 0, listed_logprobs=values))
        return made


TEACHERS = {name: seed for seed, name in enumerate(("a", "b", "c"))}
ROLLOUTS = [
    Rollout(
        f"p@0#{i}",
        "p",
        (1, 2, 3 + i),
        response,
        np.zeros(len(response), np.float32),
        "stop",
        0,
        0,
        "r",
        num_control=1,
        topk_ids=np.stack(
            [np.random.default_rng([9, i, t]).permutation(V)[:K] for t in range(len(response))]
        ).astype(np.int32),
    )
    for i, response in enumerate([(5, 6, 7, 8, 9), (11, 12)])
]
ROUTES = {
    "whole": Route("whole", V, 0, 0),
    "listed": Route("listed", K, 2, 0),
    "larger_topk": Route("larger_topk", 12, 0, 0),
}
TARGETS = [
    Target.one("b"),
    Target.of("arithmetic_mean", {"a": 1, "c": 3}),
    Target.of("geometric_mean", {"a": 1, "b": 1, "c": 2}),
]


def ask(
    target: Target, wanted: Wanted, aliases: dict[str, TokenAliases] | None = None
) -> tuple[list[TeacherScores], dict[str, Table]]:
    pools = {name: Table(seed) for name, seed in TEACHERS.items()}
    made = asyncio.run(score_target(pools, target, ROLLOUTS, wanted, aliases or {}))  # type: ignore[arg-type]
    return made, pools


def dense(target: Target, rollout: Rollout) -> np.ndarray:
    """[L, V] log-probs of the target, from the tables."""
    weights = np.asarray([weight for _, weight in target.weights])[:, None, None]
    rows = np.stack(
        [
            Table(TEACHERS[name]).rows(rollout.prompt_ids[1:], rollout.response_ids)
            for name in target.members
        ]
    )
    if target.mean == "geometric_mean":
        product = np.exp((weights * rows).sum(0))
        return np.log(product / product.sum(1, keepdims=True))
    return np.log((weights * np.exp(rows)).sum(0))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("support", ["teacher_topk", "student_topk", "union"])
def test_every_route_gives_the_target_at_the_tokens_it_lists(
    target: Target, kind: str, support: str
) -> None:
    scored, pools = ask(target, Wanted(support, K, ROUTES[kind]))
    for rollout, scores in zip(ROLLOUTS, scored, strict=True):
        wanted = dense(target, rollout)
        assert scores.teacher == target.name
        assert scores.topk_ids is not None and scores.topk_logprobs is not None
        valid = scores.topk_ids >= 0
        exact = np.take_along_axis(wanted, np.maximum(scores.topk_ids, 0).astype(np.int64), 1)
        error = np.zeros(len(wanted)) if scores.error_nats is None else scores.error_nats
        off = np.where(valid, np.abs(scores.topk_logprobs - exact), 0.0).max(1)
        assert (off <= error + 1e-5).all()
        sampled = wanted[np.arange(len(wanted)), list(rollout.response_ids)]
        assert (np.abs(scores.sampled_logprobs - sampled) <= error + 1e-5).all()
        if support == "student_topk" and kind != "larger_topk":
            assert rollout.topk_ids is not None
            assert np.array_equal(np.sort(scores.topk_ids), np.sort(rollout.topk_ids))
        if kind != "larger_topk" and scores.left_out is not None:
            assert scores.left_out.max() == 0.0
    for name, pool in pools.items():
        assert bool(pool.asked) == (name in target.members), "only members are asked"


def test_pieces_answer_far_less_than_one_list_for_all_positions() -> None:
    answered = {}
    for piece in (1, 2, 5):
        wanted = Wanted("student_topk", K, Route("listed", K, piece, 0))
        answered[piece] = ask(Target.one("b"), wanted)[1]["b"].listed
    assert answered[1] < answered[2] < answered[5]
    assert answered[1] <= 7 * K


def test_the_left_out_mass_of_a_larger_top_k_covers_the_error_of_the_divergence_tail() -> None:
    scored, _ = ask(Target.one("b"), Wanted("student_topk", K, Route("larger_topk", 6, 0, 0)))
    some = 0.0
    for rollout, scores in zip(ROLLOUTS, scored, strict=True):
        assert scores.topk_ids is not None and scores.left_out is not None
        assert rollout.topk_ids is not None
        wanted = np.exp(dense(Target.one("b"), rollout))
        for row in range(len(wanted)):
            gone = set(rollout.topk_ids[row].tolist()) - set(scores.topk_ids[row].tolist())
            mass = sum(wanted[row][i] for i in gone)
            assert mass <= scores.left_out[row] + 1e-6
            some = max(some, mass)
    assert some > 0.0


def test_a_mean_of_sampled_tokens_needs_no_list() -> None:
    target = TARGETS[1]
    scored, pools = ask(target, Wanted())
    assert pools["a"].asked == [0] and pools["c"].asked == [0] and not pools["b"].asked
    for rollout, scores in zip(ROLLOUTS, scored, strict=True):
        wanted = dense(target, rollout)[
            np.arange(len(rollout.response_ids)), list(rollout.response_ids)
        ]
        np.testing.assert_allclose(scores.sampled_logprobs, wanted, atol=1e-6)
        assert scores.topk_ids is None


def test_a_geometric_mean_of_sampled_tokens_takes_lists_for_its_normaliser_and_keeps_none() -> None:
    scored, pools = ask(TARGETS[2], Wanted("", 0, ROUTES["whole"]))
    assert pools["a"].asked == [V]
    for rollout, scores in zip(ROLLOUTS, scored, strict=True):
        wanted = dense(TARGETS[2], rollout)[
            np.arange(len(rollout.response_ids)), list(rollout.response_ids)
        ]
        np.testing.assert_allclose(scores.sampled_logprobs, wanted, atol=1e-5)
        assert scores.topk_ids is None


def test_aliased_tokens_are_asked_for_and_listed_by_the_student_s_ids() -> None:
    aliases = {"b": TokenAliases({3: 30, 30: 3})}
    wanted = Wanted("student_topk", K, ROUTES["listed"])
    rollout = ROLLOUTS[0]
    assert rollout.topk_ids is not None
    plain, swapped = ask(Target.one("b"), wanted)[0][0], ask(Target.one("b"), wanted, aliases)[0][0]
    table = dense(Target.one("b"), rollout)
    table[:, [3, 30]] = table[:, [30, 3]]
    assert swapped.topk_ids is not None and swapped.topk_logprobs is not None
    exact = np.take_along_axis(table, swapped.topk_ids.astype(np.int64), 1)
    np.testing.assert_allclose(swapped.topk_logprobs, exact, atol=1e-5)
    assert plain.topk_ids is not None
    assert np.array_equal(np.sort(plain.topk_ids), np.sort(swapped.topk_ids))


# ---------------------------------------------------------------- the choice of a route


@pytest.mark.parametrize(
    ("vocab_size", "topk", "wanted", "kind"),
    [
        (151_936, 64, 0, "topk"),
        (32, 64, 64, "topk"),
        (1_024, 64, 64, "whole"),
        (151_936, 64, 64, "listed"),
        (151_936, 64, 192, "listed"),
    ],
)
def test_the_route_is_the_exact_one_that_fits_the_budget(
    vocab_size: int, topk: int, wanted: int, kind: str
) -> None:
    route = choose_route(vocab_size, topk, wanted, 16384)
    assert route.kind == kind
    assert route.bytes_per_token <= 16384
    assert route.is_exact
    assert route.topk <= vocab_size


def test_a_piece_is_as_long_as_is_cheapest_and_fits() -> None:
    pieces = [choose_route(151_936, 64, wanted, 16384).piece for wanted in (2, 4, 16, 64, 192)]
    assert pieces == [64, 32, 8, 2, 2]
    assert choose_route(151_936, 16, 16, 16384).bytes_per_token < 8192
    assert choose_route(151_936, 16, 16, 2048).piece == 3, "the budget"


def test_an_inexact_route_is_taken_only_where_a_recipe_asks_for_it() -> None:
    with pytest.raises(
        ConfigError, match=r"no exact route fits it.*raise it to 57\d\d.*in_process.*larger_topk"
    ):
        choose_route(151_936, 64, 84, 5000)
    route = choose_route(151_936, 64, 84, 5000, "larger_topk")
    assert route.kind == "larger_topk" and not route.is_exact
    assert route.topk > 4 * 64 and route.bytes_per_token <= 5000
    with pytest.raises(ConfigError, match=r"route_bytes_per_token=700.*raise it to 1438"):
        choose_route(151_936, 64, 64, 700, "larger_topk")


def test_a_route_that_is_asked_for_is_taken_beyond_the_budget() -> None:
    assert choose_route(151_936, 64, 64, 64, "whole").topk == 151_936
    assert choose_route(151_936, 64, 64, 64, "listed").piece == 1


def recipe(support: str, kind: str = "rows", estimator: str = "support_matching") -> Recipe:
    return Recipe(
        teachers={name: TeacherConfig(path=name) for name in "abc"},
        objective=ObjectiveConfig(estimator=estimator, support=support, topk=8),
        teaching=TeachingConfig(kind=kind),
    )


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (recipe("teacher_topk"), "topk"),
        (recipe("teacher_topk_plus_sampled"), "topk"),
        (recipe("intersection"), "topk"),
        (recipe("union"), "listed"),
        (recipe("teacher_topk", "arithmetic_mean"), "listed"),
        (recipe("teacher_topk", "hard_switch"), "topk"),
        (recipe("teacher_topk", estimator="policy_gradient"), None),
        (recipe("teacher_topk", "arithmetic_mean", "policy_gradient"), None),
        (recipe("teacher_topk", "geometric_mean", "policy_gradient"), "listed"),
    ],
)
def test_a_recipe_asks_for_no_more_than_it_needs(made: Recipe, kind: str | None) -> None:
    route = route_of(made, 151_936)
    assert (None if route is None else route.kind) == kind


def test_a_mean_inside_the_learner_does_not_make_servers_answer_more() -> None:
    inside = {name: TeacherConfig(path=name, engine="in_process") for name in "ab"}
    made = Recipe(
        teachers={**inside, "c": TeacherConfig(path="c")},
        objective=ObjectiveConfig(estimator="support_matching", topk=8),
        teaching=TeachingConfig(kind="arithmetic_mean", weights={"a": 1.0, "b": 1.0}),
    )
    route = route_of(made, 151_936)
    assert route is not None and route.kind == "topk" and route.topk == 8
