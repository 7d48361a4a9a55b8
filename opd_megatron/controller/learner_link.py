"""The controller's end of the learner mailbox: send one command, wait for its answer, with a deadline.

While a command is under way the ranks' heartbeat (exchange/beats.py) is watched as well: a rank that hangs is found
when nobody has moved for `hang_timeout_s`, however long the command may take.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_megatron.atomic import read_json
from opd_megatron.errors import EXIT_CONFIG, ConfigError, OpdError, RoleDied
from opd_megatron.exchange import mailbox
from opd_megatron.exchange.beats import WITH_SERVERS, RankWatch, last_beats


class LearnerLink:
    """One command at a time, numbered from 1.

    Args:
        folder: the mailbox of this attempt.
        timeout_s: how long one command may take.
        hang_timeout_s: how long no rank may move during a command.
    """

    def __init__(self, folder: Path, timeout_s: float, hang_timeout_s: float = math.inf) -> None:
        self.folder = folder
        self.timeout_s = timeout_s
        self.hang_timeout_s = hang_timeout_s
        self._number = 0
        self._lock = asyncio.Lock()

    async def wait_ready(
        self, deadline_s: float, on_wait: Callable[[float], None]
    ) -> dict[str, Any]:
        """Wait for every rank to be up; returns what the learner says of itself.

        Raises:
            RoleDied: not ready in time.
            OpdError: a rank failed on its way, with its exit code.
        """
        start = time.monotonic()
        path = self.folder / mailbox.READY
        while not path.exists():
            # A rank that fails before the first command posts that as the answer to it.
            failure = mailbox.read_answer(self.folder, 1)
            if failure is not None:
                raise _failure("start", failure)
            waited = time.monotonic() - start
            if waited > deadline_s:
                raise RoleDied(
                    f"learner: not ready after {deadline_s:.0f} s (learner.start_timeout_s); see its log"
                )
            on_wait(waited)
            await asyncio.sleep(0.05)
        return read_json(path)

    async def ask(self, kind: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its result.

        Raises:
            RoleDied: no answer before the deadline, or no rank moves.
            OpdError: the learner answered with a failure, with its exit code.
        """
        async with self._lock:
            self._number += 1
            number = self._number
            mailbox.post_command(self.folder, number, kind, **arguments)
            start = time.monotonic()
            limit_s = math.inf if kind in WITH_SERVERS else self.hang_timeout_s
            watch = RankWatch(self.folder, limit_s)
            while (answer := mailbox.read_answer(self.folder, number)) is None:
                if watch.stand_still():
                    raise RoleDied(
                        f"learner hangs in {kind!r}: no rank has moved for {limit_s:g} s "
                        f"(learner.hang_timeout_s); {last_beats(self.folder)}; see its log for their stacks"
                    )
                waited = time.monotonic() - start
                if waited > self.timeout_s:
                    raise RoleDied(
                        f"learner: no answer to {kind!r} after {self.timeout_s:.0f} s "
                        f"(learner.step_timeout_s); {last_beats(self.folder) or 'no rank was seen'}; see its log"
                    )
                await asyncio.sleep(mailbox.pause_s(waited))
        if not answer["ok"]:
            raise _failure(kind, answer)
        return answer["result"]

    def tell_to_stop(self) -> None:
        """Let the ranks end; nothing waits for it, since everything that counts is committed."""
        mailbox.post_command(self.folder, self._number + 1, "stop")


def _failure(kind: str, answer: dict[str, Any]) -> OpdError:
    """What the learner answered in place of a result. 78 stays 78: a retry would fail in the same way."""
    error = answer["error"]
    wanted = ConfigError if error["exit_code"] == EXIT_CONFIG else OpdError
    return wanted(f"learner, {kind}: {error['type']}: {error['message']}")
