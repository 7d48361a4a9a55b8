"""The rules of a pool: who gets a request, who is in service, what reaches the caller.

Real servers behind it are in tests/real/test_faults.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.errors import (
    ContractError,
    InvalidRequest,
    NumericsError,
    OpdError,
    RequestRefused,
    ServerError,
    TimedOut,
    Unreachable,
)
from opd_megatron.serving.contract import ScoredResponse
from opd_megatron.serving.members import Member, State, choose
from opd_megatron.serving.pool import ServerPool

PAIR = [((1, 2), (3,))]


class ScriptedServer:
    """Does what its script says, one entry a call: an error is raised, a number is the version it answers with."""

    def __init__(self, name: str, script: Sequence[OpdError | int] = ()) -> None:
        self.name = name
        self.script: list[Any] = list(script)
        self.calls = self.updates = 0
        self.is_ready = True
        self.version = 0

    async def score(self, sequences: Sequence[Any], topk: int = 0) -> list[ScoredResponse]:
        self.calls += 1
        await asyncio.sleep(0.001)
        entry = self.script.pop(0) if self.script else self.version
        if isinstance(entry, OpdError):
            raise entry
        return [ScoredResponse(np.zeros(1, np.float32), entry) for _ in sequences]

    async def wait_ready(self, deadline_s: float) -> Any:
        while not self.is_ready:
            await asyncio.sleep(0.005)

    async def model_info(self) -> Any:
        if not self.is_ready:
            raise Unreachable(f"{self.name} is gone")


def pool_of(servers: Sequence[Any], timeout_s: float = 5.0) -> ServerPool:
    pool = ServerPool("rollout", servers, return_timeout_s=timeout_s, say=lambda line: None)

    async def bring_up(server: Any) -> int:
        server.updates += 1
        server.version = 4
        return 4

    pool.bring_up = bring_up
    for server in servers:
        server.version = 4
        pool.admit(server, 4)
    return pool


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await work()

    return asyncio.run(bounded())


def in_service(name: str, load: int = 0) -> Member:
    client: Any = ScriptedServer(name)
    return Member(client, State.IN_SERVICE, 0, load)


def test_the_least_loaded_server_in_service_is_chosen() -> None:
    members = [in_service("a", 3), in_service("b", 1), in_service("c", 2)]
    assert choose(members, (1,)) is members[1]
    members[1].state = State.STALE
    assert choose(members, (1,)) is members[2]
    members[2].state = members[0].state = State.OUT
    assert choose(members, (1,)) is None


def test_of_equal_servers_a_prompt_always_meets_the_same_one_and_prompts_spread() -> None:
    members = [in_service(f"s{number}") for number in range(4)]
    chosen = [choose(members, (7, number)) for number in range(400)]
    assert chosen == [choose(members, (7, number)) for number in range(400)]
    assert all(70 <= chosen.count(member) <= 130 for member in members)
    members[0].state = State.OUT
    moved = [choose(members, (7, number)) for number in range(400)]
    assert all(b is a for a, b in zip(chosen, moved, strict=True) if a is not members[0])


def test_what_goes_on_stays_with_the_server_that_has_read_it_while_that_one_answers() -> None:
    members = [in_service("a", 9), in_service("b")]
    assert choose(members, (1,), stay_with="a") is members[0]
    assert choose(members, (1,), stay_with="gone") is members[1]
    assert choose(members, (1,), avoid=[members[0]], stay_with="a") is members[1]
    members[0].state = State.OUT
    assert choose(members, (1,), stay_with="a") is members[1]


def test_a_server_that_failed_a_request_does_not_get_it_again_while_there_is_another() -> None:
    members = [in_service("a"), in_service("b", 9)]
    assert choose(members, (1,), avoid=[members[0]]) is members[1]
    assert choose(members[:1], (1,), avoid=[members[0]]) is members[0]


@pytest.mark.parametrize(
    "failure", [TimedOut("hangs"), Unreachable("dead"), ServerError("aborted"), 3]
)
def test_work_of_a_failed_server_is_done_elsewhere_and_the_server_comes_back_updated(
    failure: OpdError | int,
) -> None:
    async def work() -> None:
        servers = [ScriptedServer("a", [failure]), ScriptedServer("b", [failure, 4])]
        servers[0].script = servers[1].script = [failure, 4]  # whoever is asked first fails
        pool = pool_of(servers)
        (answer,) = await pool.score(PAIR)
        assert answer.weight_version == 4
        while pool.counts.returned == 0:
            await asyncio.sleep(0.01)
        assert set(pool.states.values()) == {State.IN_SERVICE}
        assert sum(server.updates for server in servers) == 1
        assert (pool.counts.left, sum(pool.counts.failures.values())) == (1, 1)

    run(work)


def test_an_answer_of_another_version_never_reaches_the_caller() -> None:
    async def work() -> None:
        servers = [ScriptedServer("a"), ScriptedServer("b")]
        pool = pool_of(servers)
        servers[0].version = 0  # it died and was started again between two requests
        answers = await asyncio.gather(*(pool.score([((1, n), (3,))]) for n in range(40)))
        assert {answer.weight_version for (answer,) in answers} == {4}
        assert pool.counts.failures["version"] >= 1

    run(work)


def test_three_broken_answers_in_a_row_take_a_server_out_and_one_does_not() -> None:
    async def work() -> None:
        bad = ScriptedServer("bad", [ContractError("?"), 4, ContractError("?"), ContractError("?")])
        pool = pool_of([bad])
        with pytest.raises(ContractError):
            await pool.score(PAIR)
        await pool.score(PAIR)
        for _ in range(2):
            with pytest.raises(ContractError):
                await pool.score(PAIR)
        assert pool.states == {"bad": State.IN_SERVICE}
        bad.script = [ContractError("?")]
        bad.is_ready = False
        with pytest.raises(ContractError):
            await pool.score(PAIR)
        assert pool.states == {"bad": State.OUT}
        await pool.close()

    run(work)


@pytest.mark.parametrize("error", [RequestRefused("too long"), InvalidRequest("id 99")])
def test_the_requests_own_fault_is_raised_at_once_and_blames_no_server(error: OpdError) -> None:
    async def work() -> None:
        servers = [ScriptedServer(name, [error]) for name in "ab"]
        pool = pool_of(servers)
        with pytest.raises(type(error)):
            await pool.score(PAIR)
        assert sum(server.calls for server in servers) == 1
        assert set(pool.states.values()) == {State.IN_SERVICE}

    run(work)


def test_requests_wait_for_the_only_server_to_come_back() -> None:
    async def work() -> None:
        server = ScriptedServer("only", [Unreachable("dead")])
        server.is_ready = False
        pool = pool_of([server])
        asking = asyncio.create_task(pool.score(PAIR))
        await asyncio.sleep(0.05)
        assert not asking.done()
        server.is_ready = True
        assert (await asking)[0].weight_version == 4
        assert server.updates == 1

    run(work)


def test_when_no_server_comes_back_the_error_says_why_each_left() -> None:
    async def work() -> None:
        server = ScriptedServer("only", [Unreachable("only: connection refused")])
        server.is_ready = False
        pool = pool_of([server], timeout_s=0.2)
        with pytest.raises(
            ServerError, match=r"rollout: no server .* 0\.2 s: only: connection ref"
        ):
            await pool.score(PAIR)
        await pool.close()

    run(work)


def test_a_server_that_comes_back_with_wrong_numbers_stays_out() -> None:
    async def work() -> None:
        servers = [ScriptedServer("a", [Unreachable("dead")])]
        pool = pool_of(servers)

        async def wrong(server: Any) -> int:
            raise NumericsError("not the weights")

        pool.bring_up = wrong
        with pytest.raises(NumericsError, match="not the weights"):
            await pool.score(PAIR)
        assert pool.states == {"a": State.OUT}

    run(work)


def test_an_update_leaves_out_a_server_that_died_and_fails_when_all_live() -> None:
    async def work() -> None:
        servers = [ScriptedServer("a"), ScriptedServer("b")]
        pool = pool_of(servers)
        asked: list[list[str]] = []

        async def update(clients: Sequence[Any]) -> str:
            asked.append([client.name for client in clients])
            if not all(client.is_ready for client in clients):
                raise ServerError("a gave no answer")
            return "done"

        servers[0].is_ready = False
        assert await pool.update(5, update) == "done"
        assert asked == [["a", "b"], ["b"]]
        assert pool.states == {"a": State.OUT, "b": State.IN_SERVICE}

        async def refuse(clients: Sequence[Any]) -> str:
            raise ServerError("bad path")

        with pytest.raises(ServerError, match="bad path"):
            await pool.update(6, refuse)
        await pool.close()

    run(work)
