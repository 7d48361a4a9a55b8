"""The learner's heartbeat: what every rank was last seen doing, one small file a rank in the mailbox folder.

    beat_0003    "micro-batch 5 of 8"; written when that begins, so its modification time is the rank's last step on

Written by the loop that does the work, not by a thread beside it: a thread goes on beating while the rank waits for
ever in a collective or turns in an endless loop. So one sign finds a rank that was stopped, that computes without end
and that waits for a peer which does. Ranks wait for each other within milliseconds, so a learner hangs when *no* rank
moves; the one that moved first of all is the likely cause.

Reading and writing a checkpoint are calls of a library with no place for a beat, so the limit must be longer than they
take. Commands that wait for rollout servers have deadlines of their own (weight_sync.timeout_s). Files are opened and
closed for each beat: only then does a shared file system show them to another node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from opd_megatron.lifeline import BEAT_S, Pulse

Mark = Callable[[str], None]
# Commands in which ranks wait for rollout servers.
WITH_SERVERS = frozenset({"open_group", "join_group", "send", "close_group"})
_SHOWN = 4


def unwatched(what: str) -> None:
    """The mark of a rank that nobody watches."""


class RankBeat:
    """A rank's own file.

    Args:
        folder: the mailbox.
        rank: in the learner's world.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"beat_{rank:04d}"

    def mark(self, what: str) -> None:
        """Say what begins now."""
        self._path.write_text(what)


def last_beats(folder: Path, shown: int = _SHOWN) -> str:
    """Which ranks moved last, those that stopped first in front: `rank 1 last at 'micro-batch 5 of 8' 31 s ago`."""
    found = sorted(folder.glob("beat_*"), key=lambda path: path.stat().st_mtime_ns)
    lines = [
        f"rank {int(path.name.removeprefix('beat_'))} last at {path.read_text()!r} "
        # Of a file server whose clock is ahead of this machine's.
        f"{max(0.0, time.time() - path.stat().st_mtime):.0f} s ago"
        for path in found[:shown]
    ]
    more = [f"{len(found) - shown} ranks later"] if len(found) > shown else []
    return "; ".join([*lines, *more])


class RankWatch:
    """Does any rank move while a command is under way?

    Args:
        folder: the mailbox.
        limit_s: how long all ranks may stand still.
        clock: seconds, monotonic.
    """

    def __init__(
        self, folder: Path, limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._limit_s = limit_s
        self._pulses = [Pulse(path, clock) for path in sorted(folder.glob("beat_*"))]
        self._looked = clock()

    def stand_still(self) -> bool:
        """Whether no rank has moved for the limit; looks once a second, however often it is asked."""
        now = self._clock()
        if now - self._looked < BEAT_S or not self._pulses:
            return False
        self._looked = now
        # Every pulse is read, so that none takes a moment nobody looked at for standing still.
        return min([pulse.still_s() for pulse in self._pulses]) > self._limit_s
