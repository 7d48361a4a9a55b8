"""TCP ports that stay ours from the moment they are chosen until the run ends.

A server takes half a minute to bind, so "bind port 0, close, pass the number on" loses the port to any outgoing
connection in between. Ports are therefore taken from below the ephemeral range, and each is reserved among runs
of this user by a file lock that the kernel releases when the holder dies.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from types import TracebackType

from opd_megatron.errors import ServerError

_FIRST, _LAST = 20000, 32000  # below 32768, where Linux starts ephemeral ports


class PortReservations:
    """Context manager: `reserve()` gives a loopback port; all are released at exit or death."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"opd-ports-{os.getuid()}"
        self._handles: list[int] = []

    def __enter__(self) -> PortReservations:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()

    def reserve(self) -> int:
        """A port nothing listens on and no other run has reserved.

        Raises:
            ServerError: none left.
        """
        ports = list(range(_FIRST, _LAST))
        random.SystemRandom().shuffle(ports)
        for port in ports[:500]:
            handle = os.open(
                self._folder / str(port), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
            )
            if _lock(handle) and _is_free(port):
                self._handles.append(handle)
                return port
            os.close(handle)
        raise ServerError(f"no free loopback port between {_FIRST} and {_LAST} in 500 tries")


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
