"""Where the time of a step goes, and the share in which no model was working.

Stages may overlap (a teacher scores while the student still generates). Each moment is charged to the first stage
of `order` that was at work then, so the parts add up to the step; what no stage covers is "other". Where the student
writes while the learner trains, the learner comes first: then the parts of rollouts and teachers are what the learner
had to wait for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Interval = tuple[float, float]

# A model computes in the first three.
STAGES = ("rollout", "teacher", "learner", "publish", "sync")
LEARNER_FIRST = ("learner", "publish", "sync", "teacher", "rollout")
_MODEL_STAGES = frozenset(STAGES[:3])


def union_length(intervals: Iterable[Interval]) -> float:
    """Total length covered by possibly overlapping intervals, in seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class Stopwatch:
    """Collects the intervals of one step after the other.

    Args:
        order: the stages in order of precedence.

    Attributes:
        start: of the step under way, None between two steps.
    """

    def __init__(self, order: tuple[str, ...] = STAGES) -> None:
        self.start: float | None = None
        self._order = order
        self._done: dict[str, list[Interval]] = {}
        self._open: dict[object, tuple[str, float]] = {}

    def begin(self) -> None:
        """A step begins; what is under way counts from now on."""
        self.start, self._done = time.monotonic(), {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        key, begin = object(), time.monotonic()
        self._open[key] = (name, begin)
        try:
            yield
        finally:
            del self._open[key]
            self.add(name, begin, time.monotonic())

    def add(self, name: str, begin: float, end: float) -> None:
        assert name in self._order, name
        self._done.setdefault(name, []).append((begin, end))

    def durations(self, name: str) -> list[float]:
        """Seconds of each interval of a stage that ended in this step."""
        return [end - begin for begin, end in self._done.get(name, [])]

    def _intervals(self, name: str, start: float, now: float) -> list[Interval]:
        """Of a stage, within the step."""
        still = [(begin, now) for stage, begin in self._open.values() if stage == name]
        return [(max(a, start), b) for a, b in (*self._done.get(name, []), *still) if b > start]

    def end(self) -> tuple[dict[str, float], dict[str, float]]:
        """The step ends now.

        Returns:
            perf/* of the step; and for each stage the seconds in which it was at work, whatever else was.
        """
        assert self.start is not None, "a step is under way"
        start, now = self.start, time.monotonic()
        total = now - start
        covered: list[Interval] = []
        before, model = 0.0, 0.0
        parts: dict[str, float] = {}
        busy: dict[str, float] = {}
        for stage in self._order:
            intervals = self._intervals(stage, start, now)
            busy[stage] = union_length(intervals)
            covered += intervals
            length = union_length(covered)
            parts[f"perf/{stage}_s"] = length - before
            model += length - before if stage in _MODEL_STAGES else 0.0
            before = length
        self.start = None
        return {
            "perf/step_s": total,
            **{f"perf/{stage}_s": parts[f"perf/{stage}_s"] for stage in STAGES},
            "perf/other_s": max(0.0, total - before),
            "perf/outside_model_frac": max(0.0, 1.0 - model / total) if total > 0 else 0.0,
        }, busy
