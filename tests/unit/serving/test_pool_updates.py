"""Requests that are under way while a pool's servers get new weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.errors import ContractError, NumericsError, Unreachable
from opd_megatron.serving.contract import Generation
from opd_megatron.serving.members import State
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling

SAMPLING = Sampling(temperature=1.0, max_new_tokens=3)


class SlowServer:
    """Answers a request when `finish` is set, with `spans`, or fails with `error`."""

    name = "rollout-0"

    def __init__(self) -> None:
        self.finish = asyncio.Event()
        self.spans: tuple[tuple[int, int], ...] = ()
        self.error: Exception | None = None
        self.returns = asyncio.Event()

    async def generate(self, prompts: Sequence[Any], *_: Any) -> list[Generation]:
        await self.finish.wait()
        if self.error is not None:
            raise self.error
        first, last = self.spans[0][0], self.spans[-1][0]
        nothing = np.zeros(3, np.float32)
        return [
            Generation("r", (2, 3, 4), nothing, "length", first, last, self.name, spans=self.spans)
            for _ in prompts
        ]

    async def wait_ready(self, deadline_s: float) -> None:
        await self.returns.wait()


def pool_of(server: Any) -> ServerPool:
    pool = ServerPool("rollout", [server], return_timeout_s=5.0, say=lambda line: None)
    pool.admit(server, 4)
    return pool


def ask(pool: ServerPool) -> asyncio.Task[list[Generation]]:
    return asyncio.create_task(pool.generate([(1,)], SAMPLING, ["r"]))


async def scene(spans: tuple[tuple[int, int], ...], proof: Exception | None) -> Any:
    """A request from version 4, an update to 5, an answer after the change and before its proof."""
    server = SlowServer()
    pool = pool_of(server)
    request = ask(pool)
    await asyncio.sleep(0)
    proven = False

    async def work(_: Any) -> None:
        nonlocal proven
        server.spans = spans
        server.finish.set()
        await asyncio.sleep(0.02)
        assert not request.done(), "an answer may not be used before its weights are proven"
        proven = True
        if proof is not None:
            raise proof

    try:
        await pool.update(5, work)
        answer = await request
        assert proven
        return answer, pool.states[server.name]
    finally:
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await pool.close()


def test_an_answer_of_both_versions_is_used_once_the_new_one_is_proven() -> None:
    (answer,), state = asyncio.run(scene(((4, 1), (5, 3)), None))
    assert answer.spans == ((4, 1), (5, 3)) and state is State.IN_SERVICE


def test_an_update_that_fails_its_proof_lets_no_answer_through() -> None:
    with pytest.raises(NumericsError):
        asyncio.run(scene(((4, 1), (5, 3)), NumericsError("other weights")))


def test_an_answer_of_older_weights_than_when_it_was_asked_for_is_refused() -> None:
    async def work() -> None:
        server = SlowServer()
        server.spans = ((3, 3),)
        server.finish.set()
        pool = pool_of(server)
        with pytest.raises(ContractError, match="proven to hold 4"):
            await ask(pool)
        assert pool.states[server.name] is State.OUT
        await pool.close()

    asyncio.run(work())


def test_a_server_that_fails_a_request_during_an_update_stays_out_until_it_returns() -> None:
    async def main() -> None:
        server = SlowServer()
        server.error = Unreachable("gone")
        pool = pool_of(server)
        request = ask(pool)
        await asyncio.sleep(0)

        async def work(_: Any) -> None:
            server.finish.set()
            await asyncio.sleep(0.02)

        await pool.update(5, work)
        assert pool.states[server.name] is State.OUT

        async def bring_up(_: Any) -> int:
            return 5

        pool.bring_up = bring_up
        server.error, server.spans = None, ((5, 3),)
        server.returns.set()
        (answer,) = await request
        assert answer.version_first == 5 and pool.states[server.name] is State.IN_SERVICE
        await pool.close()

    asyncio.run(main())
