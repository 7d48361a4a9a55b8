"""Starts the processes of a run on this machine, watches them, names the one that died, leaves nothing behind.

Every process is the leader of its own session, gets SIGKILL when the supervisor dies, and writes to its own log.
How an attempt ends:

    the main process (the controller) ends        its exit code is the run's, unless another process died first
    another process ends                          it has died: RoleDied, with the end of its log
    ... a server, once all roles are up           it is started again, `max_restarts` times; then as above
    ... after the controller's announcement       nothing: all work is committed and the others are no longer needed
    the controller's heartbeat stands still       RoleDied: it hangs. Other roles' hangs meet the controller's deadlines
    it is over elsewhere (a job's other node)     RoleDied, after a second in which the main process may end by itself
    SIGINT, SIGTERM, SIGHUP                       Interrupted; further signals change nothing while processes are ended

A signal only sets a flag, so that it can not break into the start or the end of a process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from opd_megatron.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, RoleDied
from opd_megatron.launch.members import kill_attempt, membership
from opd_megatron.launch.role_command import RoleCommand, describe_exit, prepare, tail
from opd_megatron.lifeline import Pulse, adopt_orphans

POLL_S = 0.1
# How long a cause and its witness may come after each other: a dead server and the controller that misses it.
ATTRIBUTION_S = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class MainSigns:
    """What the main process shows of itself, as files.

    Args:
        finishing: exists once all work is committed: from then on other processes may end, in any way.
        serving: exists once all roles are up. A server that dies before that has never worked and is not started again.
        heartbeat: touched every second.
        hang_timeout_s: how long the heartbeat may stand still.
    """

    finishing: Path
    serving: Path
    heartbeat: Path
    hang_timeout_s: float


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP reached the supervisor."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class Supervisor:
    """Context manager that owns the processes of one attempt. Main thread only: a process that is to die with its
    parent dies with the *thread* that started it, and only the main thread may handle signals.

    Args:
        attempt_id: unique among all attempts of all runs on this machine.
        environment: added to that of every process.
        say: tells the user that a server was started again.
        on_signal: called for every signal; the signal interrupts when it returns True. None: it interrupts.
        shielded: SIGTERM and SIGUSR1 from outside do not reach the processes; they end with the attempt, by SIGKILL.
    """

    def __init__(
        self,
        attempt_id: str,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = print,
        on_signal: Callable[[signal.Signals], bool] | None = None,
        shielded: bool = False,
    ) -> None:
        self._shielded = shielded
        self._on_signal = on_signal
        self._attempt_id = attempt_id
        self._environment = dict(environment or {})
        self._say = say
        self._restarts: dict[str, int] = {}
        self._running: dict[str, tuple[RoleCommand, subprocess.Popen[bytes]]] = {}
        self._old_handlers: dict[signal.Signals, object] = {}
        self._interruption: signal.Signals | None = None
        self._foreign: set[int] = set()

    def __enter__(self) -> Supervisor:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a Supervisor works in the main thread only")
        self._foreign = _children()
        adopt_orphans(True)
        for number in _SIGNALS:
            # Under nohup SIGHUP is ignored, and stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old_handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            adopt_orphans(False)
            for number, handler in self._old_handlers.items():
                # After an interruption this process is about to end; one more signal must not change its exit code.
                interrupted = self._interruption is not None
                signal.signal(number, signal.SIG_IGN if interrupted else handler)  # type: ignore[arg-type]

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._on_signal is not None and not self._on_signal(signal.Signals(number)):
            return
        self._interruption = self._interruption or signal.Signals(number)

    def _check_interruption(self) -> None:
        if self._interruption is not None:
            raise Interrupted(self._interruption)

    def start(self, role: RoleCommand) -> None:
        """Start one process.

        Raises:
            Interrupted: a signal came; nothing was started.
        """
        self._check_interruption()
        role.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        log: IO[bytes]
        with role.log.open("ab") as log:
            process = subprocess.Popen(
                list(role.argv),
                stdin=subprocess.DEVNULL,
                stdout=None if role.to_console else log,
                stderr=log,
                env={
                    **os.environ,
                    **role.environment,
                    **self._environment,
                    **membership(self._attempt_id, role.name),
                },
                start_new_session=True,
                preexec_fn=lambda: prepare(parent, self._shielded),
            )
        self._running[role.name] = (role, process)

    def watch(
        self,
        main: str,
        signs: MainSigns | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> int:
        """Wait for the main process and return its exit code.

        Args:
            is_over: true once the attempt has ended elsewhere, so that what the main process does is of no account.

        Raises:
            RoleDied: another process ended first, or the main process hangs: the message names it and shows the
                end of its log; or the attempt is over.
            ConfigError: the same, and the process said by its exit code that a retry will not help.
            Interrupted: SIGINT, SIGTERM or SIGHUP.
        """
        pulse = Pulse(signs.heartbeat) if signs else None
        while True:
            self._check_interruption()
            self._reap_orphans()
            code = self._running[main][1].poll()
            if code is not None:
                return self._judge(main, code)
            dead = self._dead(main)
            if dead is not None and signs and self._starts_again(dead, signs):
                continue
            if dead is not None and not (signs and signs.finishing.exists()):
                # The main process may be at its end too, or be saying what it missed.
                code = self._wait_briefly(main)
                if code in (EXIT_DONE, EXIT_CONFIG):
                    return code
                raise self._death(dead)
            if is_over():
                code = self._wait_briefly(main)
                if code is not None:
                    return code
                raise RoleDied(f"{main} is ended: another role has ended the attempt")
            if pulse and signs and pulse.still_s() > signs.hang_timeout_s:
                log = self.log_of(main)
                raise RoleDied(
                    f"{main} hangs: no heartbeat for {signs.hang_timeout_s:g} s "
                    f"(controller.hang_timeout_s); the end of its log ({log}):\n{tail(log)}"
                )
            time.sleep(POLL_S)

    def _starts_again(self, name: str, signs: MainSigns) -> bool:
        """Start a dead server again, if it may be; True when it was."""
        role, process = self._running[name]
        done = self._restarts.get(name, 0)
        is_over = signs.finishing.exists() or not signs.serving.exists()
        if is_over or done >= role.max_restarts or process.returncode == EXIT_CONFIG:
            return False
        # A server's workers may outlive it for a moment, with its memory and its port.
        kill_attempt(self._attempt_id, name)
        self._restarts[name] = done + 1
        self._say(
            f"{name} ended with {describe_exit(process.returncode)} and is started again "
            f"({done + 1} of {role.max_restarts}); see {role.log}"
        )
        self.start(role)
        return True

    def check(self) -> None:
        """For a caller that waits for something else; call it a few times a second.

        Raises:
            RoleDied, ConfigError: a process ended.
            Interrupted: as `watch`.
        """
        self._check_interruption()
        dead = self._dead("")
        if dead is not None:
            raise self._death(dead)

    def attend(self, until: Callable[[], bool], signs: MainSigns) -> None:
        """Stay with processes that have no main one among them until `until()` is true; dead servers start again.

        Args:
            signs: of the main process, which is on another node.

        Raises:
            RoleDied, ConfigError: one of them ended before.
            Interrupted: as `watch`.
        """
        while not until():
            self._check_interruption()
            self._reap_orphans()
            dead = self._dead("")
            # The end of the attempt and that of its processes may be seen in either order.
            if dead is not None and not until() and not self._starts_again(dead, signs):
                raise self._death(dead)
            time.sleep(POLL_S)

    def _judge(self, main: str, code: int) -> int:
        """The main process failed: was it for the death of another one, which it could not know?"""
        if code in (EXIT_DONE, EXIT_CONFIG):
            return code
        deadline = time.monotonic() + (ATTRIBUTION_S if code > 0 else 0.0)
        while (dead := self._dead(main)) is None and time.monotonic() < deadline:
            self._check_interruption()
            time.sleep(POLL_S)
        if dead is not None:
            raise self._death(dead)
        return code

    def _dead(self, main: str) -> str | None:
        """Name of a process that ended."""
        ended = (n for n, (_, p) in self._running.items() if n != main and p.poll() is not None)
        return next(ended, None)

    def _death(self, name: str) -> RoleDied | ConfigError:
        role, process = self._running[name]
        message = (
            f"{name} ended with {describe_exit(process.returncode)}; the end of its log "
            f"({role.log}):\n{tail(role.log)}"
        )
        return ConfigError(message) if process.returncode == EXIT_CONFIG else RoleDied(message)

    def _wait_briefly(self, name: str) -> int | None:
        try:
            return self._running[name][1].wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return None

    def _reap_orphans(self) -> None:
        """Collect dead descendants whose parents died before them; those started here are left to `Popen`."""
        ours = {process.pid for _, process in self._running.values()}
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None or dead.si_pid in ours:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)

    def log_of(self, name: str) -> Path:
        return self._running[name][0].log

    def _terminate(self) -> None:
        """Ask those to end that may take a moment for it, and wait that long."""
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

    def stop(self) -> None:
        """End every process and everything they started. Returns when all are gone."""
        if not self._shielded:
            self._terminate()
        kill_attempt(self._attempt_id)
        for _, process in self._running.values():
            process.wait()
        self._running.clear()
        # Adopted processes that were already ending when `kill_attempt` looked: until they are collected their
        # sockets may be open.
        deadline = time.monotonic() + ATTRIBUTION_S
        while True:
            self._reap_orphans()
            if _children() <= self._foreign or time.monotonic() >= deadline:
                return
            time.sleep(0.02)


def _children() -> set[int]:
    """Ids of this process's children, ended but uncollected ones too."""
    return {process.pid for process in psutil.Process().children()}
