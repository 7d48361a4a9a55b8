"""Mathematical answers with the package math-verify, in a worker process with a hard time limit.

Parsing what a model wrote can take minutes (sympy expands `9**9**9`), and math-verify's own limit
is a signal that only works in a main thread and not inside C code. So the work is done in a process
that is killed when it is late; the response then counts as wrong, and a warning says so. The next
call starts a new worker.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from opd_megatron.errors import ConfigError, ServerError

_log = logging.getLogger(__name__)

PACKAGE = "math_verify"
TIMEOUT_S = 10.0  # a normal answer takes milliseconds
START_TIMEOUT_S = 120.0  # importing sympy from a cold shared file system
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
    """`grader(prompt_text, response_text, answer, ended)`; one call at a time.

    Raises (when made):
        ConfigError: math-verify is not installed.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ConfigError.of(
                "evaluation.grader",
                "math_verify",
                "the package math-verify is not installed",
                "run `pip install math-verify` or choose another grader",
            )
        self._timeout_s = timeout_s
        self._worker: tuple[SpawnProcess, Connection] | None = None

    def __call__(
        self, prompt_text: str, response_text: str, answer: str | None, ended: bool
    ) -> bool:
        if not ended or answer is None:
            return False
        _, connection = self._worker = self._worker or self._start()
        try:
            connection.send((answer, response_text))
            if connection.poll(self._timeout_s):
                return connection.recv()
            why = f"took longer than {self._timeout_s:g} s"
        except (EOFError, ConnectionError):
            why = "ended its worker process"
        self.close()
        _log.warning("math-verify %s; counted as wrong: %r", why, response_text[-_ECHO_LENGTH:])
        return False

    def close(self) -> None:
        """End the worker process. Safe to call more than once."""
        if self._worker is None:
            return
        process, connection = self._worker
        self._worker = None
        connection.close()
        process.kill()
        process.join()

    def _start(self) -> tuple[SpawnProcess, Connection]:
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
