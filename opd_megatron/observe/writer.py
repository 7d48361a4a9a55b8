"""`metrics.jsonl`: one row per step, `{"step", "attempt", "time_s", metric: value, ...}`.

Rows are checked against the table of metrics before they are written. Other sinks are left out:
what reads rows (`read_rows`) can forward them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from opd_megatron.observe.jsonl import JsonlWriter, Row, read_rows
from opd_megatron.observe.metrics import checked

METRICS_JSONL = "metrics.jsonl"

__all__ = ["METRICS_JSONL", "MetricsWriter", "Row", "read_rows"]


class MetricsWriter:
    """Appends the row of each step.

    Args:
        path: `RUN/metrics.jsonl`.
        attempt: 1 for the first start of the run, one more for each resume.
        committed_step: step of the commit this attempt starts from; 0 keeps only the evaluation
            before training, -1 nothing. Later rows are dropped, because their steps are repeated.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        path: Path,
        attempt: int,
        committed_step: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._attempt = attempt
        self._clock = clock
        self._lines = JsonlWriter(path, committed_step)

    @property
    def dropped(self) -> int:
        """Rows removed at the start because their steps are repeated."""
        return self._lines.dropped

    def write(self, step: int, values: Mapping[str, object]) -> Row:
        """Write the row of a step and return it.

        Raises:
            UnknownMetric: a name that is not in the table.
            NumericsError: a NaN or an infinity.
            ValueError: a step that is not after the last one.
        """
        if step <= self._lines.last_step:
            raise ValueError(
                f"metrics row of step {step}: step {self._lines.last_step} is already written; "
                f"one row per step, in order"
            )
        row: Row = {"step": step, "attempt": self._attempt, "time_s": round(self._clock(), 3)}
        row |= checked(values)
        self._lines.append(row)
        return row

    def close(self) -> None:
        self._lines.close()
