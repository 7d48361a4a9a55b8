"""A reverse proxy in front of a real SGLang server that does something wrong with some answers, by seed.

Each `/generate` request may be hit by one fault, and every fault that was really injected is in `injected`: what is
not in there did not happen. Other routes pass untouched.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import orjson
from aiohttp import web

# What a pool counts each fault as; the three others are not failures of a server.
COUNTED_AS = {
    "kill": "unreachable",
    "cut": "unreachable",
    "500": "unreachable",
    "502": "unreachable",
    "hang": "no answer",
    "401": "refused",
    "garbage": "contract",
    "nan": "contract",
    "truncated": "contract",
    "shifted": "contract",
    "replay": "contract",
    "version": "version",
}
FAULTS = (*COUNTED_AS, "400", "429", "503", "slow")
# Not injected: on a busy machine the caller's patience may end before an honest answer comes.
LATE = "late"
SLOW_S = 0.3
# A hang lasts as long as its caller's patience, so it comes less often than the others.
_HANG_WEIGHT = 0.4


def _rows(item: dict[str, Any]) -> list[Any]:
    """The log-prob rows of an answer, of generated tokens or of scored ones."""
    meta = item["meta_info"]
    # A busy server may list one output row for a score too, though it generated nothing.
    return meta["output_token_logprobs" if item["output_ids"] else "input_token_logprobs"]


def _truncated(body: Any) -> bytes:
    _rows(body[-1]).pop()
    return orjson.dumps(body)


def _shifted(body: Any) -> bytes:
    """Every row moves up by one, ids and log-probs together; the length stays."""
    rows = _rows(body[-1])
    rows[:] = [*rows[1:], [-1.0, (rows[-1][1] + 1) % 8, None]]
    return orjson.dumps(body)


def _nan(body: Any) -> bytes:
    _rows(body[-1])[-1][0] = "here"
    return orjson.dumps(body).replace(b'"here"', b"NaN")


def _version(body: Any) -> bytes:
    meta = body[-1]["meta_info"]
    meta["weight_version"] = str(int(meta["weight_version"]) + 1)
    for span in meta["weight_versions"]:
        span["version"] = meta["weight_version"]
    return orjson.dumps(body)


_REWRITES: dict[str, Callable[[Any], bytes]] = {
    "truncated": _truncated,
    "shifted": _shifted,
    "nan": _nan,
    "version": _version,
    "garbage": lambda body: b"\x00\xff{",
}


class FaultProxy:
    """Use as an async context manager; `url` is then the address to call.

    Args:
        target: URL of the real server.
        rate: share of `/generate` requests that are hit.
        kinds: faults to choose from, equally likely but for `hang`.
    """

    def __init__(self, target: str, seed: int, rate: float, kinds: Sequence[str] = FAULTS) -> None:
        self.target, self.rate, self.kinds = target, rate, kinds
        self._weights = [_HANG_WEIGHT if kind == "hang" else 1.0 for kind in kinds]
        self.injected: Counter[str] = Counter()
        self.url = ""
        self._rng = random.Random(seed)
        self._earlier: deque[bytes] = deque(maxlen=4)

    async def __aenter__(self) -> FaultProxy:
        self._session = aiohttp.ClientSession()
        self._runner = web.ServerRunner(
            web.Server(self._handle, handler_cancellation=True), shutdown_timeout=0.1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        is_hit = request.path == "/generate" and self._rng.random() < self.rate
        kind = self._rng.choices(self.kinds, self._weights)[0] if is_hit else ""
        if kind in ("400", "401", "429", "500", "502", "503"):
            self.injected[kind] += 1
            return web.json_response({"error": {"message": "injected"}}, status=int(kind))
        if kind == "kill":
            return self._drop(request, kind)
        if kind == "hang":
            self.injected[kind] += 1
            await asyncio.sleep(3600)
        try:
            if kind == "slow":
                await asyncio.sleep(SLOW_S)
                self.injected[kind] += 1
            status, raw = await self._forward(request)
        except asyncio.CancelledError:  # the caller is gone
            self.injected[LATE] += request.path == "/generate"
            raise
        except aiohttp.ClientError:  # the real server is gone
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if kind == "cut":
            return await self._cut(request, raw)
        if kind == "replay" and self._earlier:
            self.injected[kind] += 1
            return web.Response(body=self._rng.choice(self._earlier), content_type=_JSON)
        if kind in _REWRITES and status == 200:
            self.injected[kind] += 1
            return web.Response(body=_REWRITES[kind](orjson.loads(raw)), content_type=_JSON)
        if request.path == "/generate" and status == 200:
            self._earlier.append(raw)
        return web.Response(status=status, body=raw, content_type=_JSON)

    async def _forward(self, request: web.BaseRequest) -> tuple[int, bytes]:
        headers = {
            name: request.headers[name]
            for name in ("Authorization", "Content-Type")
            if name in request.headers
        }
        async with self._session.request(
            request.method,
            self.target + request.path_qs,
            data=await request.read(),
            headers=headers,
        ) as answer:
            return answer.status, await answer.read()

    def _drop(self, request: web.BaseRequest, kind: str) -> web.StreamResponse:
        self.injected[kind] += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _cut(self, request: web.BaseRequest, raw: bytes) -> web.StreamResponse:
        """The connection ends in the middle of the body."""
        response = web.StreamResponse(headers={"Content-Type": _JSON})
        response.content_length = len(raw)
        await response.prepare(request)
        await response.write(raw[: len(raw) // 2])
        return self._drop(request, "cut")


_JSON = "application/json"
