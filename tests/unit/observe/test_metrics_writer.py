"""metrics.jsonl under kills and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_megatron.errors import DataError, NumericsError
from opd_megatron.observe.jsonl import JsonlWriter
from opd_megatron.observe.writer import MetricsWriter, read_rows


def write_steps(path: Path, last: int, attempt: int = 1, committed_step: int = -1) -> MetricsWriter:
    writer = MetricsWriter(path, attempt, committed_step, clock=lambda: 100.0)
    for step in range(committed_step + 1, last + 1):
        writer.write(step, {"train/loss": step / 10})
    return writer


def test_a_row_is_flat_and_carries_step_attempt_and_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1).close()
    assert read_rows(path) == [
        {"step": 0, "attempt": 1, "time_s": 100.0, "train/loss": 0.0},
        {"step": 1, "attempt": 1, "time_s": 100.0, "train/loss": 0.1},
    ]


def test_resume_drops_the_rows_after_the_commit_and_repeats_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 7).close()
    writer = write_steps(path, 9, attempt=2, committed_step=4)
    writer.close()
    rows = read_rows(path)
    assert writer.dropped == 3
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["attempt"] for row in rows] == [1] * 5 + [2] * 5


def test_a_new_start_without_a_commit_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 2).close()
    MetricsWriter(path, attempt=2, committed_step=-1).close()
    assert read_rows(path) == []


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "att', b"\x00\x00\x00", b'{"step": 3, "a": "\xe2\x86']
)
def test_a_torn_last_line_is_dropped_and_the_next_row_is_whole(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 2).close()
    path.write_bytes(path.read_bytes() + torn)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]
    write_steps(path, 3, attempt=2, committed_step=2).close()
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]
    assert path.read_bytes().endswith(b"}\n")


def test_a_last_row_without_its_line_end_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 2).close()
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(path, 3, attempt=2, committed_step=2).close()
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]


def test_damage_before_the_last_line_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_rows(path)


def test_a_step_is_written_once_and_in_order(tmp_path: Path) -> None:
    writer = write_steps(tmp_path / "metrics.jsonl", 3)
    with pytest.raises(ValueError, match="step 3 is already written"):
        writer.write(3, {"train/loss": 0.0})
    writer.close()


def test_a_refused_row_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = write_steps(path, 1)
    with pytest.raises(NumericsError):
        writer.write(2, {"train/loss": float("nan")})
    writer.write(2, {"train/loss": 0.5})
    writer.close()
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]


def test_half_characters_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    writer = JsonlWriter(path, committed_step=-1)
    writer.append({"step": 1, "tokens": ["\udc80", "\u2192", "\n"]})
    writer.close()
    assert read_rows(path)[0]["tokens"] == ["\udc80", "\u2192", "\n"]


_ENDLESS = """
import sys
from pathlib import Path
from opd_megatron.observe.writer import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), 1, -1)
for step in range(10**9):
    writer.write(step, {"train/loss": 0.5, "train/kl_reverse": 0.25})
"""


def test_every_row_before_a_kill_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(path)], env={**os.environ, "PYTHONPATH": root}
    )
    deadline = time.monotonic() + 20
    while not (path.exists() and path.stat().st_size > 5000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    steps = [row["step"] for row in read_rows(path)]
    assert len(steps) > 10 and steps == list(range(len(steps)))
    assert json.loads(path.read_bytes().split(b"\n")[0])["step"] == 0
