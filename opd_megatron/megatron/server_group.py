"""Rank 0's end of the process group that it shares with the rollout servers.

    open       a meeting point (TCPStore) on a port of the one address that the servers are reached from
    join       the group, together with every server's ranks
    broadcast  one flat tensor from rank 0
    close      the end of the group; the others see a closed connection

The other members run SGLang, which makes its end with the same store keys (torch's `PrefixStore`
layers of `_new_process_group_helper`). The group is not one of torch.distributed's own: it has no
name there and nothing else uses it.

A member that never comes would hold up rank 0. So every wait is in a thread of its own while rank 0
watches a deadline and a file (`breaker`); on either it breaks the group: gloo's connections are shut
down (gloo itself knows no abort), NCCL's communicator is aborted. After that the group is useless and
must be opened anew. A server that comes to a broken meeting point later would wait there, in vain and
for half an hour, for members who will not come: until the group is closed, it is sent away as well.
The NCCL half was not run here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

_POLL_S = 0.001
_LOOK_S = 0.02  # between two looks at the breaker, which may be on shared storage
_BREAK_S = 5.0  # for a wait to end after its group was broken
_FAR_S = 86400.0  # for NCCL's own watchdog, which would end the process; our deadline is earlier
_NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class GroupBroken(Exception):
    """A broadcast or a join did not take place; the group can not be used again."""


@dataclass(frozen=True)
class Limit:
    """Until when to wait for the servers: a time of `time.monotonic`, or the file."""

    deadline: float
    breaker: Path

    @classmethod
    def of(cls, command: dict[str, Any]) -> Limit:
        return cls(time.monotonic() + command["timeout_s"], Path(command["breaker"]))

    def left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which a server is reached: loopback for one beside it. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _open_sockets() -> dict[int, str]:
    """Descriptors of this process's sockets, with the inode that tells a later socket apart."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed in the meantime
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found[int(name)] = target
    return found


def _shut(descriptors: Iterable[int], port: int | None = None) -> None:
    """Shut connections down, of all these sockets or of those at a local port."""
    for fd in descriptors:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
            # gloo ends the process when a socket that it listens on is shut.
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            if port is None or connection.getsockname()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _without_nccl_teardown() -> Iterator[None]:
    """NCCL's watchdog ends the process when a peer dies, unless the group is made under this."""
    before = os.environ.get(_NCCL_ERRORS)
    os.environ[_NCCL_ERRORS] = "0"
    try:
        yield
    finally:
        os.environ.pop(_NCCL_ERRORS)
        if before is not None:
            os.environ[_NCCL_ERRORS] = before


class ServerGroup:
    """See the module docstring.

    Args:
        host: address to listen on; the servers must reach it.
        device: of the tensors that will be sent.

    Attributes:
        host, port: where the servers find the meeting point.
    """

    def __init__(self, host: str, device: torch.device) -> None:
        self.host = host
        self._device = device
        self._others = _open_sockets()
        self._backend: Any = None
        self._sockets: dict[int, str] | None = None
        self._closed = threading.Event()
        # torch's own store would listen on every interface.
        listener = socket.create_server((host, 0))
        self.port: int = listener.getsockname()[1]
        self._store = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def join(self, name: str, world_size: int, limit: Limit) -> None:
        """Meet the servers; rank 0 of `world_size` is this process.

        Raises:
            GroupBroken: not all came.
        """
        kind = self._device.type
        keys: Store = self._store
        for prefix in (name, f"{name}/", f"{kind}/"):
            keys = PrefixStore(prefix, keys)

        def make() -> Any:
            if kind == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = datetime.timedelta(seconds=_FAR_S)
                with _without_nccl_teardown():
                    return dist.ProcessGroupNCCL(keys, 0, world_size, options)
            timeout = datetime.timedelta(seconds=max(1.0, limit.left_s()))
            return dist.ProcessGroupGloo(keys, 0, world_size, timeout)

        try:
            self._backend = self._bounded(make, limit, "the servers to join the group")
        except GroupBroken:
            threading.Thread(target=self._send_away, daemon=True).start()
            raise
        self._sockets = self._new_sockets()

    def broadcast(self, flat: torch.Tensor, limit: Limit) -> None:
        """Send one tensor to all; returns when it may be overwritten.

        Raises:
            GroupBroken: it did not reach all of them.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = datetime.timedelta(seconds=max(1.0, limit.left_s()))
        options.asyncOp = True

        def send() -> None:
            work = self._backend.broadcast([flat], options)
            while not work.is_completed():
                time.sleep(_POLL_S)
            work.wait()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        self._bounded(send, limit, "every server to take part in a broadcast")

    def close(self) -> None:
        """Leave, so that nobody waits for this process; a closed group may be closed again."""
        self._closed.set()
        if self._backend is not None or self._sockets is None:
            self._break()

    def _bounded(self, work: Callable[[], Any], limit: Limit, what: str) -> Any:
        """The result of `work`, which waits for other processes and can not be interrupted itself."""
        outcome: list[Any] = []
        errors: list[Exception] = []

        def run() -> None:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            try:
                outcome.append(work())
            except Exception as error:  # carried to the thread that waits
                errors.append(error)

        began = looked = time.monotonic()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        reason = None
        while reason is None and thread.is_alive():
            thread.join(_POLL_S)
            now = time.monotonic()
            if now > limit.deadline:
                reason = f"waited {now - began:.0f} s for {what}"
            elif now - looked > _LOOK_S:
                looked = now
                if limit.breaker.exists():
                    reason = f"told to stop waiting for {what}"
        if reason is None and not errors:
            return outcome[0]
        self._break()
        thread.join(_BREAK_S)
        raise GroupBroken(reason or str(errors[0]).partition("\n")[0])

    def _new_sockets(self) -> dict[int, str]:
        now = _open_sockets()
        return {fd: inode for fd, inode in now.items() if self._others.get(fd) != inode}

    def _break(self) -> None:
        """End every connection of the group and of the meeting point."""
        if self._device.type == "cuda" and self._backend is not None:
            self._backend.abort()
        ours = self._sockets if self._sockets is not None else self._new_sockets()
        present = _open_sockets()
        _shut([fd for fd, inode in ours.items() if present.get(fd) == inode])
        self._backend, self._sockets = None, {}

    def _send_away(self) -> None:
        """End what still connects to the meeting point; it keeps listening, or servers would try again and again."""
        while not self._closed.wait(_LOOK_S):
            _shut(self._new_sockets(), self.port)
