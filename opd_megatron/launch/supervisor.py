"""Starts the processes of a run on this machine, watches them, names the one that died, leaves nothing behind.

Every process is the leader of its own session, gets SIGKILL when the supervisor dies, and writes to its own log.
The controller is the one whose end ends the run; any other process that ends first has died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from opd_megatron.errors import RoleDied
from opd_megatron.lifeline import die_with_parent

ATTEMPT_VARIABLE = "OPD_ATTEMPT_ID"
POLL_S = 0.1
TAIL_LINES = 20


@dataclass(frozen=True)
class RoleCommand:
    """One process of a run.

    Args:
        name: e.g. "rollout-0".
        argv: command line; holds no secret.
        environment: added to this process's environment.
        log: file that receives stdout and stderr.
        to_console: stdout goes to the terminal instead (stderr still goes to the log).
        grace_s: how long it may take to end by itself after SIGTERM. 0: SIGKILL at once (stateless servers).
    """

    name: str
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    to_console: bool = False
    grace_s: float = 0.0


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented, for an error message."""
    if not path.exists():
        return "  (no log)"
    text = path.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(f"  | {line}" for line in text) or "  (the log is empty)"


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM reached the supervisor."""


class Supervisor:
    """Context manager that owns the processes of one attempt.

    Args:
        attempt_id: unique among all attempts of all runs on this machine.
    """

    def __init__(self, attempt_id: str) -> None:
        self._attempt_id = attempt_id
        self._running: dict[str, tuple[RoleCommand, subprocess.Popen[bytes]]] = {}
        self._old_handlers: dict[int, object] = {}

    def __enter__(self) -> Supervisor:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old_handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave processes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            self.stop()
        finally:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    def start(self, role: RoleCommand) -> None:
        """Start one process."""
        role.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        log: IO[bytes]
        with role.log.open("ab") as log:
            process = subprocess.Popen(
                list(role.argv),
                stdin=subprocess.DEVNULL,
                stdout=None if role.to_console else log,
                stderr=log,
                env={**os.environ, **role.environment, ATTEMPT_VARIABLE: self._attempt_id},
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        self._running[role.name] = (role, process)

    def watch(self, main: str) -> int:
        """Wait for the main process and return its exit code.

        Raises:
            RoleDied: another process ended first; the message names it and shows the end of its log.
            Interrupted: SIGINT or SIGTERM.
        """
        while True:
            code = self._running[main][1].poll()
            if code is not None:
                return code
            for name, (role, process) in self._running.items():
                if name != main and process.poll() is not None:
                    # The main process may be reporting the cause right now; its own words are better.
                    code = self._wait_briefly(main)
                    if code is not None:
                        return code
                    raise RoleDied(
                        f"{name} ended with {describe_exit(process.returncode)}; the end of its log "
                        f"({role.log}):\n{tail(role.log)}"
                    )
            time.sleep(POLL_S)

    def _wait_briefly(self, name: str) -> int | None:
        try:
            return self._running[name][1].wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return None

    def log_of(self, name: str) -> Path:
        return self._running[name][0].log

    def stop(self) -> None:
        """End every process and everything they started. Returns when all are gone."""
        for role, process in self._running.values():
            if process.poll() is None and role.grace_s > 0:
                process.terminate()
        deadline = time.monotonic() + max((r.grace_s for r, _ in self._running.values()), default=0)
        for role, process in self._running.values():
            if role.grace_s > 0 and process.poll() is None:
                try:
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        kill_attempt(self._attempt_id)
        for _, process in self._running.values():
            process.wait()
        self._running.clear()


def describe_exit(code: int) -> str:
    """`exit code 3` or `signal SIGKILL`."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def kill_attempt(attempt_id: str) -> list[str]:
    """SIGKILL every process of an attempt, however deep it was started, and wait until all are gone.

    Members are known by an environment variable that children inherit: sessions and parents do not tell, since
    torchrun gives its workers sessions of their own and orphans lose their parent.

    Returns:
        names of the processes that were alive.
    """
    killed: list[str] = []
    for _ in range(20):
        members = [p for p in psutil.process_iter() if _belongs(p, attempt_id)]
        if not members:
            return killed
        for process in members:
            try:
                killed.append(process.name())
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(members, timeout=5)
    raise RoleDied(f"processes of attempt {attempt_id} survive SIGKILL: {killed}")


def _belongs(process: psutil.Process, attempt_id: str) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
        return alive and process.environ().get(ATTEMPT_VARIABLE) == attempt_id
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return False
