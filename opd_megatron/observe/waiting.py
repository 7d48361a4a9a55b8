"""Waiting is never silent: every 30 s say what is awaited, from whom, and for how long.

    async with WaitNotice("scores of step 12", on=lambda: pool.pending_words(), say=console.say):
        await everything

`WaitClock` is the part without IO, for loops that poll. Time limits are left to the code that
waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from opd_megatron.observe.formats import human_duration

NOTICE_EVERY_S = 30.0
Words = str | Callable[[], str]


class WaitClock:
    """Says when a notice is due.

    Args:
        what: what is awaited, e.g. "the answer to 'train' of step 12".
        on: who has to deliver, as words or as a function of what is still missing.
        limit_s: when the waiting code will give up; shown when given.
        every_s: time between notices.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        what: str,
        on: Words,
        limit_s: float | None = None,
        every_s: float = NOTICE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._on = on
        self._limit_s = limit_s
        self._every_s = every_s
        self._clock = clock
        self._began = clock()
        self._next = self._began + every_s

    @property
    def waited_s(self) -> float:
        return self._clock() - self._began

    def due(self) -> str | None:
        """The notice, when it is time for one, else None."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + self._every_s
        on = self._on if isinstance(self._on, str) else self._on()
        limit = f", gives up after {human_duration(self._limit_s)}" if self._limit_s else ""
        return f"waiting {human_duration(self.waited_s)} for {self._what}, on {on}{limit}"


class WaitNotice:
    """Async context manager that says the notices of a `WaitClock` while its body waits.

    Args:
        what, on, limit_s, every_s: as in `WaitClock`.
        say: receives each notice as one line.
    """

    def __init__(
        self,
        what: str,
        on: Words,
        say: Callable[[str], None],
        limit_s: float | None = None,
        every_s: float = NOTICE_EVERY_S,
    ) -> None:
        self._what = what
        self._on = on
        self._say = say
        self._limit_s = limit_s
        self._every_s = every_s

    async def _tick(self, clock: WaitClock) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            notice = clock.due()
            if notice is not None:
                self._say(notice)

    async def __aenter__(self) -> WaitClock:
        clock = WaitClock(self._what, self._on, self._limit_s, self._every_s)
        self._task = asyncio.create_task(self._tick(clock))
        return clock

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.cancel()
        (outcome,) = await asyncio.gather(self._task, return_exceptions=True)
        if error is None and isinstance(outcome, Exception):
            raise outcome
