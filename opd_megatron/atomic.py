"""Files that are either absent or whole: write a temporary sibling, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync_dir(path: Path) -> None:
    """Make renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make the content of an already written file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, content: bytes, durable: bool = True, mode: int = 0o644) -> None:
    """Replace `path` by `content`; a reader sees the old file or the new one, never a part.

    Args:
        durable: also survive a power loss (two fsyncs). False for messages that only live while processes do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        fsync_dir(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` when the block ends, and is removed when it fails.

    For what a library writes by itself. Not durable: for messages that only live while processes do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, durable: bool = True, mode: int = 0o644) -> None:
    """Write strict JSON (NaN and infinities are refused) atomically."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode(), durable, mode)


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())
