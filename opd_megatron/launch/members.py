"""The processes of an attempt, however deep they were started, and what they leave outside the run directory.

Members are known by an environment variable that children inherit: sessions and parents do not tell, since
torchrun gives its workers sessions of their own and orphans lose their parent.

Servers and torchrun put sockets and logs into the temporary folder and leave them there when they are killed, so
each attempt has a temporary folder of its own, which goes with it. Its name is short: a Unix socket's path may
have 107 bytes.
"""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from opd_megatron.errors import RoleDied

ATTEMPT_VARIABLE = "OPD_ATTEMPT_ID"
ROLE_VARIABLE = "OPD_ROLE"
_SERVER_SHM = "/dev/shm/sglang_loads_"  # sglang/srt/managers/load_snapshot.py, shm_path_for


def membership(attempt_id: str, role: str) -> dict[str, str]:
    """The environment that makes a process and all its descendants members of an attempt, in one role."""
    # SGLang renames its workers with setproctitle, which by default writes over the environment in /proc.
    # https://pypi.org/project/setproctitle/
    return {ATTEMPT_VARIABLE: attempt_id, ROLE_VARIABLE: role, "SPT_NOENV": "1"}


def kill_attempt(attempt_id: str, role: str | None = None) -> list[str]:
    """SIGKILL every process of an attempt, or of one of its roles, wait until all are gone, remove the shared memory
    they had.

    Returns:
        names of the processes that were alive.

    Raises:
        RoleDied: some can not be killed (in an uninterruptible system call, for example).
    """
    killed: list[str] = []
    shared: set[Path] = set()
    for _ in range(20):
        members = [p for p in psutil.process_iter() if _belongs(p, attempt_id, role)]
        if not members:
            for path in shared:
                path.unlink(missing_ok=True)
            return killed
        shared |= {path for process in members for path in _shared_memory(process.pid)}
        for process in members:
            try:
                killed.append(process.name())
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(members, timeout=5)
    raise RoleDied(f"processes of attempt {attempt_id} survive SIGKILL: {killed}")


def _belongs(process: psutil.Process, attempt_id: str, role: str | None) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
        if not alive:
            return False
        variables = process.environ()
        is_member = variables.get(ATTEMPT_VARIABLE) == attempt_id
        return is_member and role in (None, variables.get(ROLE_VARIABLE))
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return False


def _shared_memory(pid: int) -> set[Path]:
    """Files in shared memory that a server removes when it ends by itself, which it never does here.

    One that is killed by another hand leaves its file: 16 KiB, and nothing says later whose it was.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # it has just ended
        return set()
    return {Path(line.split()[-1]) for line in lines if _SERVER_SHM in line and "(" not in line}


def scratch_folder(attempt_id: str) -> Path:
    """The temporary folder of an attempt's processes."""
    return Path(tempfile.gettempdir()) / f"opd-{attempt_id[:12]}"


@contextmanager
def scratch(attempt_id: str) -> Generator[dict[str, str]]:
    """Make the temporary folder, give the environment that points there, remove it at the end."""
    folder = scratch_folder(attempt_id)
    folder.mkdir(mode=0o700)
    # What was compiled is worth keeping between attempts; its default place is inside the temporary folder.
    compiled = folder.with_name(f"torchinductor_{getpass.getuser()}")
    name = "TORCHINDUCTOR_CACHE_DIR"
    try:
        yield {"TMPDIR": str(folder), name: os.environ.get(name, str(compiled))}
    finally:
        remove_scratch(attempt_id)


def remove_scratch(attempt_id: str) -> None:
    """Remove it with all it holds; it may be gone."""
    folder = scratch_folder(attempt_id)
    if folder.exists():
        shutil.rmtree(folder)
