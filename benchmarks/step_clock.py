"""Where the seconds of a step go: clocks around the functions that it calls, from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.measure import clock


class Clocked:
    """Seconds by stage, from clocks around functions; what runs inside another is taken from the outer one."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[float] = []

    def wrap(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = clock(self.device)
            self._open.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                spent = clock(self.device) - start
                inner = self._open.pop()
                self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - inner
                if self._open:
                    self._open[-1] += spent

        return timed
