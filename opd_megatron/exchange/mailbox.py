"""Commands from the controller to the learner, and their answers, as numbered files in one folder.

Protocol, one command at a time:

    controller   writes  command_000007.json   {"number": 7, "kind": "train", ...arguments}
    learner      reads it, works, and
                 writes  answer_000007.json    {"number": 7, "ok": true, "result": {...}}
                 or                            {"number": 7, "ok": false, "error": {"type", "message", "exit_code"}}

The folder belongs to one attempt of a run, so nothing left over by a killed process is ever read. At start the
learner writes `ready.json`. Files appear by rename. Both sides poll: on a shared file system that is the only
signal that works everywhere. The longer they have waited, the less often they look, so that a file system whose servers
many jobs share is not asked hundreds of times a second by one that waits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_megatron.atomic import read_json, write_json

READY = "ready.json"
_SHORTEST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.1
_LATE_FRAC = 0.02


def pause_s(waited_s: float) -> float:
    """Seconds until the next look after `waited_s` of waiting: what comes is seen 2 % late at most, or 2 ms."""
    return min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, _LATE_FRAC * waited_s))


def command_path(folder: Path, number: int) -> Path:
    return folder / f"command_{number:06d}.json"


def answer_path(folder: Path, number: int) -> Path:
    return folder / f"answer_{number:06d}.json"


def post_command(folder: Path, number: int, kind: str, **arguments: Any) -> None:
    """Controller side. Paths are passed as strings."""
    write_json(
        command_path(folder, number), {"number": number, "kind": kind, **arguments}, durable=False
    )


def read_command(folder: Path, number: int) -> dict[str, Any] | None:
    """Learner side: the command, or None when it has not been posted yet."""
    path = command_path(folder, number)
    return read_json(path) if path.exists() else None


def post_answer(folder: Path, number: int, result: dict[str, Any]) -> None:
    write_json(
        answer_path(folder, number),
        {"number": number, "ok": True, "result": result},
        durable=False,
    )


def post_failure(folder: Path, number: int, error: BaseException, exit_code: int) -> None:
    write_json(
        answer_path(folder, number),
        {
            "number": number,
            "ok": False,
            "error": {"type": type(error).__name__, "message": str(error), "exit_code": exit_code},
        },
        durable=False,
    )


def read_answer(folder: Path, number: int) -> dict[str, Any] | None:
    """Controller side: the answer, or None when it is not there yet."""
    path = answer_path(folder, number)
    return read_json(path) if path.exists() else None
