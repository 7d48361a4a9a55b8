"""Append-only JSON lines that survive a kill: a torn last line is dropped, a resume cuts.

    {"step": 12, ...}\n
    {"step": 13, ...}\n
    {"step": 1              <- the process died here: not a row

A resumed run repeats the steps after its last commit, so rows beyond that step are removed first,
by rewriting the file atomically. Rows are never edited otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_megatron.atomic import write_bytes
from opd_megatron.errors import DataError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a file, in order; a missing file has none.

    Raises:
        DataError: a line before the last one is not a JSON object (a kill can only tear the last).
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    last = len(lines) - 1
    rows: list[Row] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number != last:
            raise DataError(f"{path}:{number + 1}: not a JSON object; the file was damaged")
    return rows


def _parse(line: bytes) -> Row | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _encode(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (half a character cut by a token border) becomes its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


class JsonlWriter:
    """Appends rows that carry a `step`.

    Args:
        path: the file; made when missing.
        committed_step: rows of later steps are dropped; -1 drops all (nothing was committed).
    """

    def __init__(self, path: Path, committed_step: int) -> None:
        self.path = path
        rows = read_rows(path)
        kept = [row for row in rows if row["step"] <= committed_step]
        self.dropped = len(rows) - len(kept)
        self.last_step = max((row["step"] for row in kept), default=-1)
        content = b"".join(_encode(row) for row in kept)
        if not path.exists() or path.read_bytes() != content:
            write_bytes(path, content)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and make it durable, so that a commit never lacks the rows before it."""
        content = _encode(row)
        written = os.write(self._fd, content)
        if written != len(content):
            raise OSError(f"{self.path}: wrote {written} of {len(content)} bytes; disk full?")
        os.fsync(self._fd)
        self.last_step = max(self.last_step, row["step"])

    def close(self) -> None:
        os.close(self._fd)
