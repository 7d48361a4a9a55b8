"""Mathematical answers with the package math-verify, in a worker process with a hard time limit.

Parsing what a model wrote can take minutes (sympy expands `9**9**9`), and math-verify's own limit
is a signal that only works in a main thread and not inside C code. So the work is done in a process
that is killed when it is late; the response then counts as wrong, and a warning says so. The next
call starts a new worker.

Graders are called from several threads at once (the shares of an evaluation, the groups of a step). A worker answers
one of them at a time, because an answer does not say whose question it is of; there are a few workers.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import queue
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from opd_megatron.errors import ConfigError, ServerError

_log = logging.getLogger(__name__)

PACKAGE = "math_verify"
TIMEOUT_S = 10.0  # a normal answer takes milliseconds
START_TIMEOUT_S = 120.0  # importing sympy from a cold shared file system
WORKERS = 4  # at most; as many are started as are needed at once
_ECHO_LENGTH = 80
_NO_LIMIT = 0  # math-verify's own limit, a signal, off: ours is to kill the worker


def is_equal(gold: str, response_text: str) -> bool:
    """Runs in the worker. Gold comes first: math-verify's comparison is not symmetric."""
    from math_verify import parse, verify  # type: ignore[import-not-found]

    gold_parsed = parse(f"\\boxed{{{gold}}}", parsing_timeout=_NO_LIMIT)
    response_parsed = parse(response_text, parsing_timeout=_NO_LIMIT)
    return bool(verify(gold_parsed, response_parsed, timeout_seconds=_NO_LIMIT))


def _serve(connection: Connection) -> None:
    """Answer requests until the other side closes; the first message says that imports are done."""
    import math_verify  # type: ignore[import-not-found]

    # It warns at every call that the time limit is ours; that is the point.
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)

    connection.send(math_verify.__name__)
    while True:
        try:
            gold, response_text = connection.recv()
        except EOFError:
            return
        connection.send(is_equal(gold, response_text))


class MathVerifyGrader:
    """`grader(prompt_text, response_text, answer, ended)`, from any thread.

    Raises (when made):
        ConfigError: math-verify is not installed.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, workers: int = WORKERS) -> None:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ConfigError.of(
                "evaluation.grader",
                "math_verify",
                "the package math-verify is not installed",
                "run `pip install math-verify` or choose another grader",
            )
        self._workers = tuple(_Worker(timeout_s) for _ in range(workers))
        # The last one that was used comes first, so that callers who take turns share one process.
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._free.put(worker)

    def __call__(
        self, prompt_text: str, response_text: str, answer: str | None, ended: bool
    ) -> bool:
        if not ended or answer is None:
            return False
        worker = self._free.get()
        try:
            return worker.verify(answer, response_text)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End the worker processes. Safe to call more than once, with no call under way."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process, started when it is first needed. One caller at a time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._running: tuple[SpawnProcess, Connection] | None = None

    def verify(self, gold: str, response_text: str) -> bool:
        """False, with a warning, where the worker is late or dies."""
        _, connection = self._running = self._running or _start()
        try:
            connection.send((gold, response_text))
            if connection.poll(self._timeout_s):
                return connection.recv()
            why = f"took longer than {self._timeout_s:g} s"
        except (EOFError, ConnectionError):
            why = "ended its worker process"
        self.close()
        _log.warning("math-verify %s; counted as wrong: %r", why, response_text[-_ECHO_LENGTH:])
        return False

    def close(self) -> None:
        if self._running is None:
            return
        process, connection = self._running
        self._running = None
        connection.close()
        process.kill()
        process.join()


def _start() -> tuple[SpawnProcess, Connection]:
    # spawn, because forking a process with running threads can hang it; daemon, because it must
    # not outlive us.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    if not ours.poll(START_TIMEOUT_S):
        process.kill()
        raise ServerError(f"the math-verify worker did not start within {START_TIMEOUT_S:g} s")
    try:
        ours.recv()
    except EOFError as error:
        raise ConfigError.of(
            "evaluation.grader",
            "math_verify",
            "the package math-verify cannot be imported",
            "see the traceback above, or choose another grader",
        ) from error
    return process, ours
