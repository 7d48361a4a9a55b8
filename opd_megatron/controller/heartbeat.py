"""The controller shows the supervisor every second that its event loop turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from opd_megatron.lifeline import BEAT_S, beat


@asynccontextmanager
async def beating(path: Path) -> AsyncGenerator[None]:
    """Touch `path` every `BEAT_S` seconds while the body runs, from the event loop: a loop that hangs is silent."""

    async def turn() -> None:
        while True:
            beat(path)
            await asyncio.sleep(BEAT_S)

    task = asyncio.create_task(turn(), name="heartbeat")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
