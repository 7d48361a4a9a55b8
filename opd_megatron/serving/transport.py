"""HTTP to one server: one session, JSON both ways, bounded sizes, bounded retries, plain errors.

A call is tried again only where nothing can have been answered: the connection failed, or the
status is 429 or 5xx. Any other 4xx is final, and so is a timeout (the budget of time is spent).
Redirects and proxies are off: a server of a run answers on its own address or not at all. Whatever
goes wrong ends as `ServerError` (the server's side) or `ContractError` (an unreadable answer),
naming server, route and cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp
import orjson

from opd_megatron.errors import ContractError, RequestRefused, ServerError
from opd_megatron.serving.contract import error_message

Result = TypeVar("Result")

# Far above any sane answer (a whole vocabulary of 152k for 1000 tokens), far below memory.
MAX_RESPONSE_BYTES = 2 << 30
_REQUEST_IS_WRONG = (400, 413, 422)
_FIRST_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 5.0
# Shorter than the server's own 5 s, so that a connection is not reused while it is being closed.
_KEEP_ALIVE_S = 2.0
_CHUNK_BYTES = 1 << 16
_CONNECT_TIMEOUT_S = 10.0


class Unanswered(Exception):
    """A try that may be repeated: no connection, a lost one, or a status that says try again."""


class HttpTransport:
    """Requests to one base URL.

    Args:
        name: what error messages call the server, e.g. "rollout-0".
        url: base URL, e.g. "http://127.0.0.1:30000".
        timeout_s: budget of one request, from sending to the last byte of the answer.
        max_retries: further tries after the first.
        max_response_bytes: answers above this size are refused.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        timeout_s: float,
        max_retries: int,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.max_response_bytes = max_response_bytes
        self._session: aiohttp.ClientSession | None = None

    def error(self, route: str, cause: object) -> ServerError:
        return ServerError(f"{self.name} ({self.url}) {route}: {cause}")

    async def with_retries(
        self, route: str, attempt_call: Callable[[int], Awaitable[Result]]
    ) -> Result:
        """Await `attempt_call(attempt)` until it answers or the retry budget is spent.

        Raises:
            RequestRefused: the server calls this request wrong (400, 413, 422).
            ServerError: refused otherwise, timed out, or still unanswered after the last try.
            ContractError: the answer breaks the contract.
        """
        for attempt in range(self.max_retries + 1):
            try:
                return await attempt_call(attempt)
            except Unanswered as error:
                if attempt == self.max_retries:
                    tries = f"gave up after {attempt + 1} tries"
                    raise self.error(route, f"{error}; {tries}") from error
            except ContractError as error:
                raise ContractError(f"{self.name} ({self.url}) {route}: {error}") from error
            await asyncio.sleep(min(_FIRST_BACKOFF_S * 2**attempt, _MAX_BACKOFF_S))
        raise AssertionError("unreachable: the last try returns or raises")

    async def request_once(
        self,
        method: str,
        route: str,
        *,
        key: str | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Send one request, return its decoded JSON (None for an empty or plain-text answer).

        Raises:
            Unanswered: may be tried again.
            ServerError, ContractError: final.
        """
        status, content_type, raw = await self._send(method, route, key, body, timeout_s)
        is_json = content_type == "application/json"
        try:
            answer = orjson.loads(raw) if is_json and raw else None
        except orjson.JSONDecodeError as error:
            raise ContractError(f"status {status}, body is not JSON: {error}") from error
        if status == 200:
            return answer
        message = error_message(answer) or raw[:200].decode(errors="replace")
        cause = f"status {status}: {message}"
        if status == 429 or status >= 500:
            raise Unanswered(cause)
        if status in (401, 403):
            cause += " (not this run's key: is another process on this port?)"
        error = self.error(route, cause)
        raise RequestRefused(str(error)) if status in _REQUEST_IS_WRONG else error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _send(
        self,
        method: str,
        route: str,
        key: str | None,
        body: Mapping[str, Any] | None,
        timeout_s: float | None,
    ) -> tuple[int, str, bytes]:
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            async with self._open_session().request(
                method,
                self.url + route,
                data=None if body is None else orjson.dumps(body),
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=limit_s, sock_connect=_CONNECT_TIMEOUT_S),
            ) as response:
                raw = await self._read_bounded(response)
                return response.status, response.content_type, raw
        except aiohttp.ConnectionTimeoutError as error:
            raise Unanswered(f"no connection within {_CONNECT_TIMEOUT_S:g} s") from error
        except TimeoutError as error:
            raise self.error(route, f"no answer within {limit_s:g} s") from error
        except aiohttp.ClientError as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from error

    async def _read_bounded(self, response: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_chunked(_CHUNK_BYTES):
            size += len(part)
            if size > self.max_response_bytes:
                raise ContractError(f"answer is larger than {self.max_response_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # The caller bounds concurrency; a pool limit would count waiting against the timeout.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._session
