from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import pytest
from aiohttp import web

from opd_megatron.errors import TimedOut
from opd_megatron.serving import transport
from opd_megatron.serving.backpressure import Backpressure
from opd_megatron.serving.transport import HttpTransport


def test_there_is_no_limit_before_a_refusal_and_half_of_what_was_in_flight_after_it() -> None:
    pressure = Backpressure()
    with pressure.slot(), pressure.slot(), pressure.slot(), pressure.slot() as fourth:
        assert pressure.limit == math.inf
        pressure.refused(fourth)
        assert pressure.limit == 2.0


def test_refusals_of_requests_sent_before_the_cut_do_not_cut_again() -> None:
    pressure = Backpressure()
    with pressure.slot() as first, pressure.slot() as second, pressure.slot(), pressure.slot():
        pressure.refused(first)
        pressure.refused(second)
        assert (pressure.limit, pressure.refusals) == (2.0, 2)
        with pressure.slot() as fifth:
            pressure.refused(fifth)
        assert pressure.limit == 2.5


def test_the_limit_grows_by_about_one_for_as_many_answers_as_it_allows() -> None:
    pressure = Backpressure()
    pressure.limit = 4.0
    for _ in range(4):
        with pressure.slot(), pressure.slot(), pressure.slot(), pressure.slot():
            pressure.answered()
    assert 4.5 < pressure.limit < 5.0
    idle = pressure.limit
    with pressure.slot():
        pressure.answered()
    assert pressure.limit == idle


def test_a_caller_that_is_cancelled_while_it_waits_leaves_its_turn_to_the_next() -> None:
    async def run() -> list[str]:
        pressure, done = Backpressure(), list[str]()
        pressure.limit = 1.0

        async def work(name: str) -> None:
            await pressure.wait()
            with pressure.slot():
                await asyncio.sleep(0.01)
                done.append(name)

        jobs = {name: asyncio.create_task(work(name)) for name in "abcd"}
        await asyncio.sleep(0.001)
        jobs["b"].cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*jobs.values(), return_exceptions=True)
        return done

    assert asyncio.run(run()) == ["a", "c", "d"]


class LittleServer:
    """Answers `capacity` requests at once, 20 ms each, and tells the others to come later."""

    def __init__(self, capacity: int, headers: dict[str, str] | None = None) -> None:
        self.capacity, self.headers = capacity, headers
        self.running = self.refusals = self.most_after_refusals = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.running >= self.capacity:
            self.refusals += 1
            error = {"object": "error", "message": "The request queue is full."}
            return web.json_response(error, status=503, headers=self.headers)
        self.running += 1
        await asyncio.sleep(0.02)
        self.running -= 1
        return web.json_response({"ok": True})


def ask(server: LittleServer, count: int, **options: Any) -> list[Any]:
    async def run() -> list[Any]:
        runner = web.ServerRunner(web.Server(server.handle))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        http = HttpTransport("s", url, **{"timeout_s": 20.0, "max_retries": 0, **options})

        def one() -> Any:
            return http.with_retries("/x", lambda _: http.request_once("GET", "/x", paced=True))

        try:
            return await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
        finally:
            await http.close()
            await runner.cleanup()

    return asyncio.run(run())


def test_a_server_with_room_for_three_serves_sixty_callers_without_spending_their_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "_FIRST_BACKOFF_S", 0.01)
    server = LittleServer(3)
    assert ask(server, 60) == [{"ok": True}] * 60
    # Without a limit of their own, 57 would be refused again and again.
    assert server.refusals < 150


def test_a_server_that_is_busy_for_ever_is_given_up_at_the_deadline() -> None:
    began = time.monotonic()
    (error,) = ask(LittleServer(0), 1, timeout_s=0.5)
    assert isinstance(error, TimedOut)
    assert "no answer within 0.5 s (before: status 503: The request queue is full.)" in str(error)
    assert time.monotonic() - began < 20


def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_FIRST_BACKOFF_S", 0.001)
    began = time.monotonic()
    assert ask(LittleServer(1, {"Retry-After": "1"}), 2) == [{"ok": True}] * 2
    assert time.monotonic() - began >= 1.0
