"""What reaches a running controller from outside: a request to stop, and the beginning of a later attempt.

Both are files in the run directory, because they may come from another node or from a batch script outside the
container. They are looked for twice a second. A later attempt (`attempts/N+1`) means that this one was taken for dead,
for example behind a broken network: it must not write again, so it ends before its next commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from opd_megatron.controller import protocol
from opd_megatron.errors import Fenced, Preempted
from opd_megatron.rundir import AttemptDir

POLL_S = 0.5
WATCH_NAME = "watch for stop"


def refuse_if_fenced(attempt: AttemptDir) -> None:
    """
    Raises:
        Fenced: a later attempt of this run has begun.
    """
    if not attempt.is_newest():
        raise Fenced(
            f"attempt {attempt.number}: a later attempt of this run has begun; this one writes nothing more"
        )


@asynccontextmanager
async def ended_by_stop(attempt: AttemptDir) -> AsyncGenerator[None]:
    """For what comes before the first step, where nothing can be lost: a request to stop ends it at once.

    Raises:
        Preempted: asked to stop.
    """
    limit = asyncio.timeout(None)

    async def watch() -> None:
        while not attempt.stop_requested.exists():
            await asyncio.sleep(POLL_S)
        limit.reschedule(asyncio.get_running_loop().time())

    watching = asyncio.create_task(watch(), name=WATCH_NAME)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if limit.expired():
            raise Preempted("asked to stop before the first step of this attempt") from error
        raise
    finally:
        watching.cancel()


async def watch_for_stop(
    attempt: AttemptDir, put: Callable[[protocol.Event | BaseException], Awaitable[None]]
) -> None:
    """Put `StopRequested` into the queue once, and `Fenced` when a later attempt begins."""
    stopping = False
    while True:
        try:
            refuse_if_fenced(attempt)
        except Fenced as error:
            await put(error)
            return
        if not stopping and attempt.stop_requested.exists():
            stopping = True
            await put(protocol.StopRequested())
        await asyncio.sleep(POLL_S)
