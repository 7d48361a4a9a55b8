"""HTTP to one server: one session, JSON both ways, bounded sizes, times and tries, plain errors.

A call is tried again only where nothing can have been answered: the connection failed, or the
status is 429 or 5xx. 429 and 503 say "later": they cost no try, but the server gets fewer requests
at once from then on (`backpressure.py`) and is left alone for as long as it says. Any other 4xx is
final. One budget of time covers a call with all its tries and waits; when it is spent the call
ends. Redirects and proxies are off: a server of a run answers on its own address or not at all.
Whatever goes wrong ends as `ServerError` (the server's side) or `ContractError` (an unreadable
answer), naming server, route and cause.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp
import orjson
import tenacity

from opd_megatron.errors import ContractError, ServerError, TimedOut, Unreachable
from opd_megatron.serving.answers import Busy, Unanswered, read_answer
from opd_megatron.serving.backpressure import Backpressure

Result = TypeVar("Result")

# Far above any sane answer (a whole vocabulary of 152k for 1000 tokens), far below memory.
MAX_RESPONSE_BYTES = 2 << 30
_FIRST_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 5.0
# Shorter than the server's own 5 s, so that a connection is not reused while it is being closed.
_KEEP_ALIVE_S = 2.0
_CHUNK_BYTES = 1 << 16
_CONNECT_TIMEOUT_S = 10.0


class HttpTransport:
    """Requests to one base URL.

    Args:
        name: what error messages call the server, e.g. "rollout-0".
        url: base URL, e.g. "http://127.0.0.1:30000".
        timeout_s: budget of one call, from its first sending to the last byte of the answer.
        max_retries: further tries after the first; a server that says "later" costs none.
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
        self._pressure = Backpressure()

    @property
    def told_to_wait(self) -> int:
        """How often a paced request was answered with 429 or 503."""
        return self._pressure.refusals

    def error(self, route: str, cause: object) -> ServerError:
        return ServerError(f"{self.name} ({self.url}) {route}: {cause}")

    async def with_retries(
        self,
        route: str,
        attempt_call: Callable[[int], Awaitable[Result]],
        timeout_s: float | None = None,
    ) -> Result:
        """Await `attempt_call(attempt)` until it answers or the budget of tries or time is spent.

        Args:
            timeout_s: of the whole call; by default the transport's.

        Raises:
            RequestRefused: the server calls this request wrong (400, 413, 422).
            TimedOut: not answered in time.
            Unreachable: still no answer after the last try.
            ServerError: refused otherwise.
            ContractError: the answer breaks the contract.
        """
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        tries = _Tries(self.max_retries)
        try:
            async with asyncio.timeout(limit_s):
                async for attempt in tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception_type(Unanswered),
                    stop=tries.are_spent,
                    wait=tries.pause_s,
                    reraise=True,
                ):
                    with attempt:
                        number = attempt.retry_state.attempt_number - 1
                        return await attempt_call(number)
        except Unanswered as error:
            gave_up = f"{error}; gave up after {tries.made} tries"
            raise Unreachable(str(self.error(route, gave_up))) from error
        except TimeoutError as error:
            last = f" (before: {tries.last})" if tries.last else ""
            cause = f"no answer within {limit_s:g} s{last}"
            raise TimedOut(str(self.error(route, cause))) from error
        except ContractError as error:
            raise ContractError(str(self.error(route, error))) from error
        raise AssertionError("unreachable: the last try returns or raises")

    async def request_once(
        self,
        method: str,
        route: str,
        *,
        key: str | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        paced: bool = False,
    ) -> Any:
        """Send one request, return its decoded JSON (None for an empty or plain-text answer).

        Args:
            paced: wait while the server has as many requests as it takes; for what it may refuse as too much.

        Raises:
            Unanswered, Busy: may be tried again.
            ServerError, ContractError: final.
        """
        if not paced:
            return await self._send(method, route, key, body, timeout_s)
        await self._pressure.wait()
        with self._pressure.slot() as number:
            try:
                answer = await self._send(method, route, key, body, timeout_s)
            except Busy:
                self._pressure.refused(number)
                raise
            self._pressure.answered()
            return answer

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
    ) -> Any:
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
                later = response.headers.get("Retry-After")
                return read_answer(response.status, response.content_type, raw, later)
        except aiohttp.ConnectionTimeoutError as error:
            raise Unanswered(f"no connection within {_CONNECT_TIMEOUT_S:g} s") from error
        except TimeoutError as error:
            raise TimedOut(str(self.error(route, f"no answer within {limit_s:g} s"))) from error
        except aiohttp.ClientError as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from error
        except ServerError as error:
            raise type(error)(str(self.error(route, error))) from error

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


class _Tries:
    """The rules of repeating one call, in the form that tenacity asks for them."""

    def __init__(self, max_retries: int) -> None:
        self.made = 0
        self.last: BaseException | None = None
        self._retries_left = max_retries

    def are_spent(self, state: tenacity.RetryCallState) -> bool:
        self.made, self.last = state.attempt_number, _error_of(state)
        if isinstance(self.last, Busy):
            return False
        self._retries_left -= 1
        return self._retries_left < 0

    def pause_s(self, state: tenacity.RetryCallState) -> float:
        error = _error_of(state)
        asked_s = error.after_s if isinstance(error, Busy) else 0.0
        backoff_s = min(_FIRST_BACKOFF_S * 2 ** (state.attempt_number - 1), _MAX_BACKOFF_S)
        # Spread, so that callers who were refused together do not come back together.
        return max(asked_s, backoff_s * random.uniform(0.5, 1.0))


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()
