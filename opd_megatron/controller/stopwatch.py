"""Where the time of a step goes, and the share in which no model was working.

Stages may overlap (a teacher scores while the student still generates). Each moment is charged to the first stage
of `stages` that was at work then, so the parts add up to the step; what no stage covers is "other".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Interval = tuple[float, float]


def union_length(intervals: Iterable[Interval]) -> float:
    """Total length covered by possibly overlapping intervals, in seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class Stopwatch:
    """Collects the intervals of one step.

    `stages` in order of precedence; a model computes in the first three.
    """

    stages = ("rollout", "teacher", "learner", "publish", "sync")
    model_stages = stages[:3]

    def __init__(self) -> None:
        self.start = time.monotonic()
        self._intervals: dict[str, list[Interval]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(name, begin, time.monotonic())

    def add(self, name: str, begin: float, end: float) -> None:
        assert name in self.stages, name
        self._intervals.setdefault(name, []).append((begin, end))

    def durations(self, name: str) -> list[float]:
        """Seconds of each interval of a stage."""
        return [end - begin for begin, end in self._intervals.get(name, [])]

    def metrics(self) -> dict[str, float]:
        """perf/* of the step that ends now."""
        total = time.monotonic() - self.start
        covered: list[Interval] = []
        before, model, parts = 0.0, 0.0, {}
        for stage in self.stages:
            covered += self._intervals.get(stage, [])
            now = union_length(covered)
            parts[f"perf/{stage}_s"] = now - before
            model += now - before if stage in self.model_stages else 0.0
            before = now
        return {
            "perf/step_s": total,
            **parts,
            "perf/other_s": max(0.0, total - before),
            "perf/outside_model_frac": max(0.0, 1.0 - model / total) if total > 0 else 0.0,
        }
