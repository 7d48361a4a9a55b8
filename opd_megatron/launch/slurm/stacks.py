"""Where do the learner's ranks stand? Asked of ranks that hang, just before they are ended.

A rank registers faulthandler for SIGUSR1 (megatron/learner.py), which needs no cooperation of a thread that is stuck in
a collective: the stacks go to its log.
"""

from __future__ import annotations

import signal
import time

import psutil

from opd_megatron.launch.members import ATTEMPT_VARIABLE
from opd_megatron.lifeline import RANK_NAME

_WRITING_S = 0.5


def ranks(identity: str) -> list[psutil.Process]:
    """Learner ranks among the members of an agent."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            is_rank = process.name().startswith(RANK_NAME)
            if is_rank and process.environ().get(ATTEMPT_VARIABLE) == identity:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def dump_stacks(identity: str) -> int:
    """Ask every rank for its stacks and give it a moment to write them; returns how many were asked."""
    asked = 0
    for rank in ranks(identity):
        try:
            rank.send_signal(signal.SIGUSR1)
            asked += 1
        except psutil.NoSuchProcess:
            continue
    if asked:
        time.sleep(_WRITING_S)
    return asked
