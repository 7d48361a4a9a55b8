"""Where do the learner's ranks stand? Asked of ranks that hang, just before they are ended.

A rank registers faulthandler for SIGUSR1 (megatron/learner.py), which needs no cooperation of a thread that is stuck in
a collective: the stacks go to its log. A rank that was stopped (SIGSTOP, a debugger) is said to be; it hears SIGUSR1
once it is continued, which is done here.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import psutil

from opd_megatron.launch.members import ATTEMPT_VARIABLE
from opd_megatron.lifeline import RANK_NAME

_WRITING_S = 0.5


def ranks(identity: str) -> list[psutil.Process]:
    """Learner ranks among the members of an attempt."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            is_rank = process.name().startswith(RANK_NAME)
            if is_rank and process.environ().get(ATTEMPT_VARIABLE) == identity:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def dump_stacks(identity: str, say: Callable[[str], None]) -> int:
    """Ask every rank for its stacks and give it a moment to write them; returns how many were asked.

    Args:
        say: told of every rank that does not run.
    """
    asked = 0
    for rank in ranks(identity):
        try:
            stopped = rank.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            if stopped:
                number = rank.name().removeprefix(f"{RANK_NAME}-")
                say(f"learner rank {number} (pid {rank.pid}) was stopped")
            rank.send_signal(signal.SIGUSR1)
            if stopped:
                rank.resume()
            asked += 1
        except psutil.NoSuchProcess:
            continue
    if asked:
        time.sleep(_WRITING_S)
    return asked
