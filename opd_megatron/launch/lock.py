"""One living run per run directory: a file lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from opd_megatron.errors import ConfigError


@contextmanager
def hold(path: Path) -> Generator[None]:
    """Hold the lock of a run directory.

    Raises:
        ConfigError: another process holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            raise ConfigError.of(
                "--run-dir",
                str(path.parent),
                f"a run is alive there (pid {holder})",
                "wait for it, stop it, or choose another directory",
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """The pid in the lock file; its holder writes it a moment after it has the lock."""
    for _ in range(20):
        pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
        if pid.isdigit() and Path(f"/proc/{pid}").exists():
            return pid
        time.sleep(0.05)
    return "unknown"
