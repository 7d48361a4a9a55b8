"""Reading a run directory for the report, whatever state it is in.

A run that died at step 3 has some files and lacks others. A missing file is None or empty; a file
that can not be parsed is also None, and `problems` says which and why, so that the report can show
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from opd_megatron.errors import ContractError, DataError
from opd_megatron.observe.coloring import ROLLOUTS_JSONL, ColoredRollout
from opd_megatron.observe.environment import ENVIRONMENT_JSON
from opd_megatron.observe.jsonl import Row, read_rows
from opd_megatron.observe.metric_table import PER_TEACHER
from opd_megatron.observe.writer import METRICS_JSONL

T = TypeVar("T")
Mapped = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What was found. `run` is run.yaml (`recipe`, `overrides`, ...), `run_text` its text."""

    folder: Path
    rows: tuple[Row, ...]
    rollouts: tuple[ColoredRollout, ...]
    inputs: Mapped
    summary: Mapped
    environment: Mapped
    run: Mapped
    run_text: str | None
    problems: tuple[str, ...]

    @property
    def recipe(self) -> Mapped:
        recipe = self.run.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, without the steps that did not measure it."""
        measured = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in measured], [value for _, value in measured]

    def names(self, name: str) -> tuple[str, ...]:
        """The series of a row of the table: one, or one for each teacher."""
        family, end = name.rpartition("/")[0], name.rpartition("/")[2]
        if end != PER_TEACHER:
            return (name,)
        found = {key for row in self.rows for key in row if key.rpartition("/")[0] == family}
        return tuple(sorted(found))

    def first(self, name: str) -> float | None:
        values = self.series(name)[1]
        return values[0] if values else None

    def last(self, name: str) -> float | None:
        values = self.series(name)[1]
        return values[-1] if values else None

    @property
    def restarts(self) -> tuple[int, ...]:
        """First recorded step of every attempt after the first one."""
        return tuple(b["step"] for a, b in pairwise(self.rows) if a["attempt"] != b["attempt"])


def _mapping(text: str, parse: Callable[[str], Any]) -> Mapped:
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def load_run(folder: Path) -> RunFiles:
    """Read everything that is there.

    Args:
        folder: the run directory.
    """
    problems: list[str] = []

    def attempt(name: str, read: Callable[[Path], T], missing: T) -> T:
        path = folder / name
        if not path.exists():
            return missing
        try:
            return read(path)
        except (ValueError, DataError, ContractError, yaml.YAMLError, OSError) as error:
            problems.append(f"{name} can not be read: {error}")
            return missing

    def rows(path: Path) -> tuple[Row, ...]:
        found = read_rows(path)
        if any(not {"step", "attempt", "time_s"} <= row.keys() for row in found):
            raise ValueError("a row lacks step, attempt or time_s")
        return tuple(found)

    def rollouts(path: Path) -> tuple[ColoredRollout, ...]:
        return tuple(ColoredRollout.from_record(record) for record in read_rows(path))

    def from_json(path: Path) -> Mapped:
        return _mapping(path.read_text(), json.loads)

    def from_yaml(path: Path) -> Mapped:
        return _mapping(path.read_text(), yaml.safe_load)

    return RunFiles(
        folder=folder,
        rows=attempt(METRICS_JSONL, rows, ()),
        rollouts=attempt(ROLLOUTS_JSONL, rollouts, ()),
        inputs=attempt("inputs.json", from_json, {}),
        summary=attempt("summary.json", from_json, {}),
        environment=attempt(ENVIRONMENT_JSON, from_json, {}),
        run=attempt("run.yaml", from_yaml, {}),
        run_text=attempt("run.yaml", Path.read_text, None),
        problems=tuple(problems),
    )
