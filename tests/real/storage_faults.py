"""Counts every call that changes the disk, dies at a chosen one, and knows what a power loss would leave.

`Faults.install` replaces, in this process, the functions of `os` and `open` through which Python changes files:
create, write, fsync, rename, mkdir, unlink, rmdir. Each call is told to a pipe before it happens; the chosen one kills
the process with SIGKILL instead (a torn write first puts half of its bytes down). `torch.save` to a path would write
from C++: it goes through a counted file here.

`lose_power` then takes away, from a folder that a killed process left, everything that no fsync had made durable:
content of a file since its last fsync (the file is emptied), and new names, new folders and renames in a folder since
that folder's last fsync. Left out: reordering inside one write, and removals that had not reached the disk.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = list[str]  # kind, path, second path of a rename


class Faults:
    """Installed in the process that is to die.

    Args:
        root: only files under it count.
        journal: write end of a pipe, one JSON line per call.
        die_at: number of the call that kills, counted from 0; None lets all pass.
        torn: a killed write leaves half of its bytes.
    """

    def __init__(self, root: Path, journal: int, die_at: int | None, torn: bool) -> None:
        self.root = str(root)
        self.journal = journal
        self.die_at = die_at
        self.torn = torn
        self.count = 0

    def call(self, kind: str, *paths: str) -> bool:
        """Note one call; True when it is the one to die in."""
        if not paths[0].startswith(self.root):
            return False
        dies = self.count == self.die_at
        self.count += 1
        if not dies:
            os.write(self.journal, (json.dumps([kind, *paths]) + "\n").encode())
        return dies

    def install(self) -> None:
        import torch

        builtins.open = io.open = self._open(io.open)
        for name in ("mkdir", "unlink", "rmdir"):
            setattr(os, name, self._on_path(name, getattr(os, name)))
        for name in ("rename", "replace"):
            setattr(os, name, self._rename(getattr(os, name)))
        os.fsync = self._fsync(os.fsync)
        os.remove = os.unlink
        torch.save = self._torch_save(torch.save)

    def _on_path(self, kind: str, stock: Callable[..., None]) -> Callable[..., None]:
        def replaced(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
            folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            whole = os.path.join(folder, os.fspath(path))
            is_refused = kind == "mkdir" and os.path.exists(whole)
            if not is_refused and self.call(kind, whole):
                _die()
            stock(path, *args, dir_fd=dir_fd, **kwargs)

        return replaced

    def _rename(self, stock: Callable[..., None]) -> Callable[..., None]:
        def replaced(source: Any, target: Any) -> None:
            if self.call("rename", os.fspath(source), os.fspath(target)):
                _die()
            stock(source, target)

        return replaced

    def _fsync(self, stock: Callable[..., None]) -> Callable[..., None]:
        def replaced(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            if self.call("fsync", os.readlink(f"/proc/self/fd/{number}")):
                _die()
            stock(number)

        return replaced

    def _open(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
            if "w" not in mode or not path.startswith(self.root):
                return stock(file, mode, *args, **kwargs)
            if self.call("create", path):
                _die()
            raw = _CountedFile(self, path, file)
            return (
                io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")
            )

        return replaced

    def _torch_save(self, stock: Callable[..., None]) -> Callable[..., None]:
        def replaced(value: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(target, str | os.PathLike):
                stock(value, target, *args, **kwargs)
                return
            buffer = io.BytesIO()
            stock(value, buffer, *args, **kwargs)
            with open(target, "wb") as file:
                file.write(buffer.getvalue())

        return replaced


class _CountedFile(io.FileIO):
    """A file whose every write is a call."""

    def __init__(self, faults: Faults, path: str, file: Any) -> None:
        super().__init__(file, "wb")
        self._faults, self._path = faults, path

    def write(self, content: Any, /) -> int:
        if self._faults.call("write", self._path):
            if self._faults.torn:
                super().write(bytes(content)[: len(content) // 2])
            _die()
        return super().write(content)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _moved(path: str, source: str, target: str) -> str:
    is_inside = path == source or path.startswith(source + "/")
    return target + path[len(source) :] if is_inside else path


def not_durable(events: list[Event]) -> list[Event]:
    """Calls whose effect a power loss after the last of `events` takes back, in order."""
    pending: list[Event] = []
    for event in events:
        kind, path = event[0], event[1]
        if kind == "fsync":
            kept = []
            for old in pending:
                is_content = old[0] == "write" and old[1] == path
                is_entry = old[0] != "write" and os.path.dirname(old[-1]) == path
                if is_entry and old[0] == "rename":
                    # What happened inside before the rename is found under the new name from now on.
                    for earlier in kept:
                        earlier[1:] = [_moved(p, old[1], old[2]) for p in earlier[1:]]
                if not is_content and not is_entry:
                    kept.append(old)
            pending = kept
        elif kind in ("create", "mkdir", "rename", "write"):
            pending.append(list(event))
        else:
            pending = [old for old in pending if old[-1] != path]
    return pending


def lose_power(events: list[Event]) -> None:
    """Take back, on disk, what was not durable."""
    for event in reversed(not_durable(events)):
        kind, path = event[0], event[-1]
        if not os.path.exists(path):
            continue
        if kind == "write":
            os.truncate(path, 0)
        elif kind == "rename":
            os.rename(path, event[1])
        elif os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
