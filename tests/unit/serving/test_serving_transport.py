"""Faults of a server, injected by a small HTTP server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from opd_megatron.errors import ContractError, RequestRefused, ServerError, TimedOut, Unreachable
from opd_megatron.serving import transport
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.keys import ServerKeys
from opd_megatron.serving.requests import Sampling
from opd_megatron.serving.transport import HttpTransport

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
KEYS = ServerKeys("normal", "admin")


@pytest.fixture(autouse=True)
def _no_waiting_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_FIRST_BACKOFF_S", 0.001)


def against(handler: Handler, work: Callable[[str], Awaitable[Any]]) -> Any:
    """Run `work(url)` while `handler` answers every request."""

    async def run() -> Any:
        runner = web.ServerRunner(web.Server(handler))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await work(f"http://127.0.0.1:{port}")
        finally:
            await runner.cleanup()

    return asyncio.run(run())


async def get(url: str, **options: Any) -> Any:
    http = HttpTransport("s", url, **{"timeout_s": 5.0, "max_retries": 2, **options})
    try:
        return await http.with_retries("/x", lambda _: http.request_once("GET", "/x", key="k"))
    finally:
        await http.close()


def replies(*answers: web.Response | type[BaseException]) -> tuple[Handler, list[web.BaseRequest]]:
    """A handler that gives these answers in turn, the last one for ever; and the requests seen."""
    seen: list[web.BaseRequest] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        answer = answers[min(len(seen), len(answers) - 1)]
        seen.append(request)
        if isinstance(answer, web.Response):
            return web.Response(
                status=answer.status,
                body=answer.body,
                content_type=answer.content_type,
                headers={k: v for k, v in answer.headers.items() if k == "Location"},
            )
        assert request.transport is not None
        request.transport.abort()
        raise answer

    return handle, seen


def answer_json(value: Any, status: int = 200) -> web.Response:
    return web.json_response(value, status=status)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_or_failing_server_is_asked_again(status: int) -> None:
    handler, seen = replies(answer_json({"error": "later"}, status), answer_json({"a": 1}))
    assert against(handler, get) == {"a": 1}
    assert len(seen) == 2
    assert seen[0].headers["Authorization"] == "Bearer k"


def test_a_dropped_connection_is_asked_again() -> None:
    handler, seen = replies(ConnectionResetError, answer_json([1]))
    assert against(handler, get) == [1]
    assert len(seen) == 2


def test_retries_end_with_server_route_and_last_cause() -> None:
    handler, seen = replies(answer_json({"error": {"message": "out of memory"}}, 500))
    with pytest.raises(ServerError, match=r"s \(http.*\) /x: status 500: out of memory; gave up"):
        against(handler, get)
    assert len(seen) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_final(status: int) -> None:
    handler, seen = replies(answer_json({"error": "no"}, status))
    with pytest.raises(ServerError, match=f"status {status}: no") as caught:
        against(handler, get)
    assert len(seen) == 1
    assert isinstance(caught.value, RequestRefused) == (status in (400, 422))


def test_a_redirect_is_not_followed() -> None:
    handler, seen = replies(web.Response(status=302, headers={"Location": "/elsewhere"}))
    with pytest.raises(ServerError, match="status 302"):
        against(handler, get)
    assert [request.path for request in seen] == ["/x"]


def test_a_slow_answer_ends_after_the_budget_and_is_not_repeated() -> None:
    count = 0

    async def sleep(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal count
        count += 1
        await asyncio.sleep(1.0)
        return web.Response()

    with pytest.raises(ServerError, match=r"no answer within 0\.5 s"):
        against(sleep, lambda url: get(url, timeout_s=0.5))
    assert count == 1


def test_an_answer_above_the_size_limit_is_refused() -> None:
    handler, _ = replies(answer_json("x" * 1000))
    with pytest.raises(ContractError, match=r"s \(http.*larger than 100 bytes"):
        against(handler, lambda url: get(url, max_response_bytes=100))


def test_an_answer_that_is_not_json_is_refused() -> None:
    handler, _ = replies(web.Response(body=b"{", content_type="application/json"))
    with pytest.raises(ContractError, match="not JSON"):
        against(handler, get)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ServerError, match=r"s \(http://127\.0\.0\.1:9\).*gave up after 3 tries"):
        asyncio.run(get("http://127.0.0.1:9"))


def test_waiting_ends_at_the_deadline_and_reports_what_it_waits_for() -> None:
    handler, _ = replies(answer_json(None, 503))
    reports: list[tuple[float, str]] = []

    async def wait(url: str) -> None:
        async with SglangClient("rollout-3", url, KEYS, vocab_size=8) as client:
            await client.wait_ready(1.3, lambda waited, what: reports.append((waited, what)))

    with pytest.raises(ServerError, match=r"rollout-3 .*not ready after 1\.3 s: status 503"):
        against(handler, wait)
    assert reports
    assert "rollout-3 to load" in reports[0][1]


def test_a_server_that_says_nothing_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opd_megatron.serving.client._READY_TIMEOUT_S", 0.1)
    seen: list[str] = []

    async def load(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.path)
        if len(seen) == 1:
            await asyncio.sleep(0.5)
        return answer_json({"model_path": "m", "weight_version": "3"})

    async def wait(url: str) -> int:
        async with SglangClient("rollout-3", url, KEYS, vocab_size=8) as client:
            return (await client.wait_ready(5)).weight_version

    assert against(load, wait) == 3
    assert seen == ["/ready", "/ready", "/model_info"]


def test_another_service_on_the_port_is_told_apart() -> None:
    handler, _ = replies(web.Response(body=b"<html>", content_type="text/html"))

    async def wait(url: str) -> None:
        async with SglangClient("rollout-3", url, KEYS, vocab_size=8) as client:
            await client.wait_ready(5)

    with pytest.raises(ServerError, match="not an SGLang server"):
        against(handler, wait)


def test_a_second_try_of_a_generation_carries_another_request_id() -> None:
    bodies: list[Any] = []

    async def fail(request: web.BaseRequest) -> web.StreamResponse:
        bodies.append(await request.json())
        return answer_json({"error": "down"}, 500)

    async def generate(url: str) -> None:
        async with SglangClient("r", url, KEYS, vocab_size=8, max_retries=1) as client:
            await client.score([((1,), (2,)), ((1,), ())])

    with pytest.raises(Unreachable, match="500"):
        against(fail, generate)
    first, second = (body["rid"] for body in bodies)
    assert len(first) == len(second) == 1  # the empty response is not sent
    assert first != second
    assert bodies[0]["logprob_start_len"] == [0]


def test_only_empty_responses_need_no_call() -> None:
    async def score() -> Any:
        async with SglangClient("r", "http://127.0.0.1:9", KEYS, vocab_size=8) as client:
            return await client.score([((1,), ()), ((2,), ())], topk=4)

    scores = asyncio.run(score())
    assert [score.logprobs.shape for score in scores] == [(0,), (0,)]
    assert [score.topk_ids.shape for score in scores] == [(0, 4), (0, 4)]
    assert scores[0].weight_version is None


def test_calls_one_after_another_share_one_connection() -> None:
    ports: set[Any] = set()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername"))
        return answer_json({"model_path": "m", "weight_version": "3"})

    async def ask(url: str) -> None:
        async with SglangClient("r", url, KEYS, vocab_size=8) as client:
            for _ in range(5):
                await client.model_info()

    against(answer, ask)
    assert len(ports) == 1


CALLS: dict[str, Callable[[SglangClient], Awaitable[Any]]] = {
    "generate": lambda c: c.generate([(1,)], Sampling(temperature=1.0, max_new_tokens=2), ["a"]),
    "score": lambda c: c.score([((1,), (2,))], topk=2),
    "model_info": lambda c: c.model_info(),
    "weight_checksums": lambda c: c.weight_checksums(),
    "flush_cache": lambda c: c.flush_cache(),
    "abort_all": lambda c: c.abort_all(),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_has_a_deadline(name: str) -> None:
    async def hang(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        return web.Response()

    async def ask(url: str) -> None:
        async with SglangClient("r", url, KEYS, vocab_size=8, timeout_s=0.05) as client:
            await CALLS[name](client)

    with pytest.raises(TimedOut, match="no answer within"):
        against(hang, ask)
