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
import time
from pathlib import Path
from types import TracebackType

from opd_megatron.errors import ServerError

_FIRST, _LAST = 20000, 32000  # below 32768, where Linux starts ephemeral ports


class PortReservations:
    """Context manager: `reserve()` gives a port of one address; all are released at exit or death.

    Args:
        address: where the port is to be bound.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._address = address
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
            if self._take(port):
                return port
        raise ServerError(f"no free port of {self._address} from {_FIRST} to {_LAST} in 500 tries")

    def reserve_again(self, port: int) -> int:
        """A port that this role had before; a dead server's socket may take a moment to go.

        Raises:
            ServerError: somebody else has it.
        """
        for _ in range(50):
            if self._take(port):
                return port
            time.sleep(0.1)
        raise ServerError(f"port {port} of {self._address} is taken")

    def _take(self, port: int) -> bool:
        handle = os.open(self._folder / str(port), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if _lock(handle) and _is_free(self._address, port):
            self._handles.append(handle)
            return True
        os.close(handle)
        return False


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server does: connections of its predecessor that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
