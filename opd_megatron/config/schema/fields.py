"""Fields of a section whose rule stands in their metadata: `choices`, `low` and `high`."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def choice(default: str, *names: str) -> Any:
    """A string field limited to `names`."""
    return field(default=default, metadata={"choices": names})


def number(default: float | int, low: float | None = None, high: float | None = None) -> Any:
    """A numeric field with inclusive bounds."""
    return field(default=default, metadata={"low": low, "high": high})
