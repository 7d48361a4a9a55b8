"""Outcomes of a weight push with servers that fail on purpose; the real thing is in tests/real."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.errors import ContractError, NumericsError, OpdError, ServerError
from opd_megatron.serving.client import ModelAnswer
from opd_megatron.serving.contract import ScoredResponse
from opd_megatron.weight_sync.disk import push_weights

PROBES = [[1, 2, 3], [4, 5]]
LOGPROBS = [[-1.0, -2.0], [-3.0]]


class FaultyServer:
    """Answers as a server whose log-probs are off by `delta` nats, with a version of its own."""

    def __init__(
        self, name: str, *, delta: float = 0.0, version: int = 4, refusal: OpdError | None = None
    ) -> None:
        self.name = name
        self.delta = delta
        self.version = version
        self.refusal = refusal
        self.updates: list[tuple[Path, int]] = []

    async def update_weights_from_disk(self, directory: Path, version: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.updates.append((directory, version))

    async def model_info(self) -> ModelAnswer:
        return ModelAnswer("/w", self.version)

    async def score(self, sequences: Sequence[Any], topk: int = 0) -> list[ScoredResponse]:
        return [
            ScoredResponse(np.asarray(row, np.float32) + np.float32(self.delta), self.version)
            for row in LOGPROBS
        ]


def push(*servers: FaultyServer, probes: Any = PROBES, logprobs: Any = LOGPROBS) -> Any:
    clients: Any = servers
    return asyncio.run(
        push_weights(clients, Path("/w/v4"), 4, probes, logprobs, tolerance_nats=1e-3)
    )


def test_a_push_that_every_server_proves_is_reported() -> None:
    servers = [FaultyServer("a"), FaultyServer("b", delta=5e-4)]
    report = push(*servers)
    assert [server.server for server in report.servers] == ["a", "b"]
    assert report.max_delta == pytest.approx(5e-4, rel=1e-2)
    assert servers[0].updates == [(Path("/w/v4"), 4)]


def test_one_server_with_other_weights_fails_the_push_and_is_named_with_its_delta() -> None:
    with pytest.raises(NumericsError, match=r"1 of 2 servers: b: .* is 0\.5 nats"):
        push(FaultyServer("a"), FaultyServer("b", delta=-0.5))


def test_a_refusal_and_wrong_numbers_end_as_a_numerics_error_that_names_both() -> None:
    servers = [FaultyServer("a", refusal=ServerError("a said no")), FaultyServer("b", delta=1.0)]
    with pytest.raises(NumericsError, match=r"0 of 2 .*b: does not hold.*; a said no"):
        push(*servers)


def test_a_wrong_label_fails_the_push() -> None:
    with pytest.raises(ServerError, match="reports weight version 3, not 4"):
        push(FaultyServer("a", version=3))


def test_a_nan_score_is_not_within_any_tolerance() -> None:
    with pytest.raises(NumericsError, match="nan"):
        push(FaultyServer("a", delta=float("nan")))


@pytest.mark.parametrize(
    ("probes", "logprobs"),
    [([], []), ([[1]], [[]]), ([[1, 2]], [[-1.0, -2.0]])],
)
def test_probes_that_prove_nothing_are_refused(probes: Any, logprobs: Any) -> None:
    with pytest.raises(ContractError, match="probe"):
        push(FaultyServer("a"), probes=probes, logprobs=logprobs)


def test_non_finite_learner_log_probs_are_refused() -> None:
    with pytest.raises(NumericsError, match="not finite"):
        push(FaultyServer("a"), logprobs=[[-1.0, float("nan")], [-3.0]])
