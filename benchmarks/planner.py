"""Check the planner's model: against whole runs and learner ranks on a CPU, and against published figures.

    python -m benchmarks.planner runs|memory [--only REGEX]      measure, into benchmarks/results/planner-cpu.json
    python -m benchmarks.planner report [--write-docs]           tables, from what was measured and published

`runs`: `opd run` of the demo in several sizes and layouts; seconds by stage are medians over the steps after the first.
The device is described by two of them (`calibration`), which give the six constants of `Overheads`; the others are
predicted from those. `memory`: the learner's cases of benchmarks/step.py. Results of earlier calls stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import environment
from benchmarks.planner_cases import CALIBRATION, RUNS, RunCase
from benchmarks.planner_report import render
from benchmarks.report import write_between_markers
from benchmarks.step import _launch, predict
from benchmarks.step_cases import SHAPES, cases, write_step_batch, write_student

ROOT = environment.ROOT
RESULTS = ROOT / "benchmarks" / "results" / "planner-cpu.json"
PAGE = ROOT / "docs" / "planner.md"
_STAGES = ("rollout", "teacher", "learner", "publish", "sync", "step")
_TIMEOUT_S = 300


def measure_run(case: RunCase) -> dict[str, Any]:
    """Medians of a run's stages in seconds, and its mean length."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            *(sys.executable, "-m", "opd_megatron", "run", "demo", *case.overrides),
            *("--run-dir", str(run)),
        ]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        if done.returncode != 0:
            return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
        lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("perf/step_s")][1:]
    found: dict[str, Any] = {
        stage: median(row.get(f"perf/{stage}_s", 0.0) for row in rows) for stage in _STAGES
    }
    return {
        **found,
        "len_mean": median(row["rollout/len_mean"] for row in rows),
        "steps": len(rows),
    }


def measure_memory(only: str) -> dict[str, Any]:
    """Peak bytes of the largest learner rank and its prediction, by case."""
    found: dict[str, Any] = {}
    for case in cases("cpu"):
        if not re.search(only, case.name):
            continue
        print(case.name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            write_student(work / "student", SHAPES[case.shape], case.seed)
            write_step_batch(work / "batch.safetensors", case)
            measured = _launch(case, work, "memory")
        if "error" in measured:
            found[case.name] = measured
            continue
        rank = max(measured["ranks"], key=lambda r: r["bytes"])
        stage = predict(case, measured["num_microbatches"])[rank["stage"]]
        found[case.name] = {"measured": rank["bytes"], "predicted": stage["total"]}
    return found


def measure_runs(only: str) -> dict[str, Any]:
    """Stages of every chosen run, by case."""
    found: dict[str, Any] = {}
    for case in (*CALIBRATION, *RUNS):
        if re.search(only, case.name):
            print(case.name, file=sys.stderr, flush=True)
            found[case.name] = measure_run(case)
    return found


def _read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}, "memory": {}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner")
    parser.add_argument("what", choices=("runs", "memory", "report"))
    parser.add_argument("--only", default="", help="regular expression on the case's name")
    parser.add_argument("--write-docs", action="store_true", help="tables into docs/planner.md")
    args = parser.parse_args(arguments)
    if args.what != "report":
        measured = measure_memory(args.only) if args.what == "memory" else measure_runs(args.only)
        record = _read()
        record[args.what] |= measured
        record["environment"] = environment.describe("cpu")
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        failed = [n for kind in ("runs", "memory") for n, r in record[kind].items() if "error" in r]
        print("failed: " + ", ".join(failed) if failed else "measured", file=sys.stderr)
        return 1 if failed else 0
    text = render(_read())
    print(text)
    if args.write_docs:
        write_between_markers(PAGE, "planner", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
