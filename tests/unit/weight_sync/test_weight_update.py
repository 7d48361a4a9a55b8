"""Outcomes of a weight update with servers that fail on purpose; the real thing is in tests/real."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.errors import ContractError, NumericsError, OpdError, ServerError
from opd_megatron.serving.client import ModelAnswer
from opd_megatron.serving.contract import ScoredResponse
from opd_megatron.weight_sync.route import Offer
from opd_megatron.weight_sync.update import SyncReport, update_servers

PROBES = [[1, 2, 3], [4, 5]]
LOGPROBS = [[-1.0, -2.0], [-3.0]]


class FaultyServer:
    """Answers as a server whose log-probs are off by `delta` nats, with a version of its own."""

    def __init__(self, name: str, *, delta: float = 0.0, version: int = 4) -> None:
        self.name = name
        self.delta = delta
        self.version = version

    async def model_info(self) -> ModelAnswer:
        return ModelAnswer("/w", self.version)

    async def score(self, sequences: Sequence[Any], topk: int = 0) -> list[ScoredResponse]:
        return [
            ScoredResponse(np.asarray(row, np.float32) + np.float32(self.delta), self.version)
            for row in LOGPROBS
        ]


class FaultyRoute:
    """Writes down what it is asked for; fails at the given parts, once each."""

    def __init__(
        self, *clients: FaultyServer, fail: Sequence[tuple[str, OpdError]] = (), alive: bool = True
    ) -> None:
        self.clients: Any = clients
        self.parts: list[str] = []
        self._fail = list(fail)
        self._alive = alive

    async def offer(self, version: int, probe_tokens: Sequence[Sequence[int]]) -> Offer:
        raise AssertionError("an update is given its offer")

    async def _do(self, part: str) -> None:
        self.parts.append(part)
        for planned in self._fail:
            if planned[0] == part:
                self._fail.remove(planned)
                raise planned[1]

    async def begin(self, clients: Any, *, keep_requests: bool = False) -> None:
        await self._do("begin")

    async def send(self, clients: Any, version: int) -> None:
        await self._do("send")

    async def end(self, clients: Any, version: int) -> None:
        await self._do("end")

    async def abandon(self, clients: Any) -> bool:
        await self._do("abandon")
        return self._alive


def update(route: FaultyRoute, probes: Any = PROBES, logprobs: Any = LOGPROBS) -> SyncReport:
    return asyncio.run(
        update_servers(route, route.clients, Offer(4, probes, logprobs), tolerance_nats=1e-3)
    )


def test_an_update_that_every_server_proves_is_reported() -> None:
    route = FaultyRoute(FaultyServer("a"), FaultyServer("b", delta=5e-4))
    report = update(route)
    assert route.parts == ["begin", "send", "end"]
    assert report.version == 4 and report.first_failure is None
    assert report.max_delta == pytest.approx(5e-4, rel=1e-2)


def test_one_server_with_other_weights_fails_the_update_and_is_named_with_its_delta() -> None:
    route = FaultyRoute(FaultyServer("a"), FaultyServer("b", delta=-0.5))
    with pytest.raises(NumericsError, match=r"1 of 2 servers succeeded: b: .* is 0\.5 nats"):
        update(route)
    assert route.parts == ["begin", "send", "end"]


def test_wrong_labels_and_wrong_numbers_end_as_a_numerics_error_that_names_both() -> None:
    route = FaultyRoute(FaultyServer("a", version=3), FaultyServer("b", delta=1.0))
    with pytest.raises(NumericsError, match=r"0 of 2 .*b: does not hold.*; a: reports weight"):
        update(route)


def test_a_wrong_label_fails_the_update() -> None:
    with pytest.raises(ServerError, match="reports weight version 3, not 4"):
        update(FaultyRoute(FaultyServer("a", version=3)))


def test_a_nan_score_is_not_within_any_tolerance() -> None:
    with pytest.raises(NumericsError, match="nan"):
        update(FaultyRoute(FaultyServer("a", delta=float("nan"))))


@pytest.mark.parametrize("part", ["begin", "send", "end"])
def test_a_failure_is_cleaned_up_and_the_whole_update_starts_again(part: str) -> None:
    route = FaultyRoute(FaultyServer("a"), fail=[(part, ServerError("a said no"))])
    report = update(route)
    tried = ["begin", "send", "end"][: ["begin", "send", "end"].index(part) + 1]
    assert route.parts == [*tried, "abandon", "begin", "send", "end"]
    assert report.first_failure == "a said no"


def test_a_second_failure_is_cleaned_up_and_raised_with_the_first() -> None:
    refusals = [("send", ServerError("first no")), ("send", ServerError("second no"))]
    route = FaultyRoute(FaultyServer("a"), fail=refusals)
    with pytest.raises(ServerError, match="second no; tried twice, before: first no"):
        update(route)
    assert route.parts == ["begin", "send", "abandon", "begin", "send", "abandon"]


def test_a_server_that_does_not_answer_is_not_waited_for_a_second_time() -> None:
    route = FaultyRoute(FaultyServer("a"), fail=[("send", ServerError("gone"))], alive=False)
    with pytest.raises(ServerError, match="gone; not tried again"):
        update(route)
    assert route.parts == ["begin", "send", "abandon"]


@pytest.mark.parametrize(
    ("probes", "logprobs"),
    [([], []), ([[1]], [[]]), ([[1, 2]], [[-1.0, -2.0]])],
)
def test_probes_that_prove_nothing_are_refused_before_a_server_is_touched(
    probes: Any, logprobs: Any
) -> None:
    route = FaultyRoute(FaultyServer("a"))
    with pytest.raises(ContractError, match="probe"):
        update(route, probes=probes, logprobs=logprobs)
    assert route.parts == []


def test_non_finite_learner_log_probs_are_refused() -> None:
    with pytest.raises(NumericsError, match="not finite"):
        update(FaultyRoute(FaultyServer("a")), logprobs=[[-1.0, float("nan")], [-3.0]])
