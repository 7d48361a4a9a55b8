"""A reverse proxy in front of a real server that does one thing wrong at a chosen request of any route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from aiohttp import web

# What happens to a request instead: None forwards `body` (which it may have changed).
Fault = Callable[[dict[str, Any]], Awaitable[web.Response | None]]


@dataclass
class Rule:
    """Apply `fault` to requests number `first` to `last` (counted from 1) of a path."""

    path: str
    fault: Fault
    first: int = 1
    last: int = 1_000_000
    seen: int = 0


class RuleProxy:
    """Listens on a loopback port of its own and forwards to `target`."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.rules: list[Rule] = []
        self.url = ""

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, shutdown_timeout=0.1)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        for rule in self.rules:
            if rule.path != request.path:
                continue
            rule.seen += 1
            if rule.first <= rule.seen <= rule.last:
                body = orjson.loads(raw)
                answer = await rule.fault(body)
                if answer is not None:
                    return answer
                raw = orjson.dumps(body)
        headers = {k: request.headers[k] for k in ("Authorization", "Content-Type")
                   if k in request.headers}  # fmt: skip
        try:
            async with self._session.request(
                request.method,
                self.target + request.path_qs,
                data=raw,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=120),
            ) as answer:
                return web.Response(
                    status=answer.status,
                    body=await answer.read(),
                    headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")},
                )
        except aiohttp.ClientError:
            # The server is gone: so is the connection that the client sees.
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=502)


async def refuse(_: dict[str, Any]) -> web.Response:
    return web.json_response({"success": False, "message": "refused on purpose"}, status=400)
