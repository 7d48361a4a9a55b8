"""How many requests may be in flight at one server: as many as it takes without saying "later".

Additive increase, multiplicative decrease, as TCP does it:

    no limit until the first 429 or 503
    at a 429 or 503      limit = max(1, requests in flight / 2), at most once for the requests that were in flight
    at an answer         limit += 1 / limit, while requests reach the limit

Left out: how long to wait before the refused request goes out again; the caller's retry knows.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Backpressure:
    """The limit of one server. For use within one event loop.

    Attributes:
        limit: requests that may be in flight; infinite before the first refusal.
        refusals: how often the server said "later".
    """

    def __init__(self) -> None:
        self.limit = math.inf
        self.refusals = 0
        self._in_flight = 0
        self._sent = 0
        self._sent_at_cut = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Wait until one more request may be sent."""
        while self._in_flight > 0 and self._is_full():
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it was this caller's turn already
                    self._wake()
                raise

    @contextmanager
    def slot(self) -> Iterator[int]:
        """Occupy a place among the requests in flight; yields the number of this request."""
        self._in_flight += 1
        self._sent += 1
        try:
            yield self._sent
        finally:
            self._in_flight -= 1
            self._wake()

    def refused(self, number: int) -> None:
        """Request `number` was told to come later."""
        self.refusals += 1
        # Requests sent before the last cut say nothing about the limit that it set.
        if number > self._sent_at_cut:
            self._sent_at_cut = self._sent
            self.limit = max(1.0, self._in_flight / 2)

    def answered(self) -> None:
        """A request was answered."""
        if self._is_full():
            self.limit += 1 / self.limit
            self._wake()

    def _is_full(self) -> bool:
        return self._in_flight + 1 > self.limit

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
