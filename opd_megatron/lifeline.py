"""Signs of life between processes (Linux): a name, dying with a parent, adopting orphans, and a heartbeat file.

A process that hangs does not die, so the kernel says nothing. The heartbeat is a file whose modification time its
owner changes every second; a watcher counts how long it has stood still, by its own clock, since file systems
and machines disagree about the time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

BEAT_S = 1.0
# What a learner rank is called, before its number; a forked rank has the command line of its torchrun.
RANK_NAME = "opd-rank"
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
# A watcher that was itself suspended must not take its own absence for its ward's.
_LONGEST_LOOK_S = 2.0


def _prctl(option: int, value: int, name: str) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({name}) failed")


def take_name(name: str) -> None:
    """What `ps -o comm`, `top` and psutil call this process; the kernel keeps 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]), 0, 0, 0)


def die_with_parent(expected_parent: int | None = None) -> None:
    """Ask the kernel to SIGKILL this process when the thread that started it ends.

    Args:
        expected_parent: pid that started this process; when it is already gone (the race between fork and this
            call) the process ends at once.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "PR_SET_PDEATHSIG")
    if expected_parent is not None and os.getppid() != expected_parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_at_parents_request() -> None:
    """In a process that was started with SIGTERM blocked: end when the parent sends it, and only then.

    Slurm signals every process of a step; torchrun signals its ranks when one of them died. Does nothing where SIGTERM
    is not blocked.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if signal.SIGTERM not in blocked:
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, name="SIGTERM of the parent", daemon=True).start()


def adopt_orphans(adopt: bool) -> None:
    """Become (or cease to be) the process that orphaned descendants are handed to, instead of PID 1."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), "PR_SET_CHILD_SUBREAPER")


def beat(path: Path) -> None:
    """Show that this process is alive."""
    path.touch()


class Pulse:
    """How long a heartbeat file has stood still.

    Args:
        path: the file; it may not exist yet.
        clock: seconds, monotonic.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._seen = self._read()
        self._looked = clock()
        self._still_s = 0.0

    def _read(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def still_s(self) -> float:
        """Seconds without a beat, as far as this process was there to see; call it often."""
        now, seen = self._clock(), self._read()
        self._still_s += min(now - self._looked, _LONGEST_LOOK_S)
        self._looked = now
        if seen != self._seen:
            self._seen, self._still_s = seen, 0.0
        return self._still_s
