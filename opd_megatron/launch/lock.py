"""One living run per run directory: a file lock that the kernel drops when its holder dies.

Some shared file systems know no locks (Lustre mounted without `flock`, NFS without its lock daemon). That is said, and
what is left is that a later attempt fences an earlier one (controller/stop.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from opd_megatron.errors import ConfigError

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


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
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"opd: {path}: {error.strerror}: without locks a second run here is noticed at a commit only",
                file=sys.stderr,
                flush=True,
            )
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
