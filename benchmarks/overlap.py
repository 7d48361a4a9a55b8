"""Measure the overlap modes on the tiny recipe: wall time per step, age of the tokens, final accuracy.

    python -m benchmarks.overlap [--only MODE] [--repeats N] [--quick] [--write-docs]

Whole runs of `recipes/demo.py`, one after the other, with the mode's overrides and nothing else changed; modes take
turns, so that a machine that gets slower meanwhile is no advantage. A record holds every run; `--only` adds to it.

Left out: GPUs. On a machine whose cores are all busy with one stage already, overlap has little to win: the figures say
what it costs and what it does to learning, not what it wins where stages have machines of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks import environment
from benchmarks.report import table, write_between_markers

ROOT = environment.ROOT
DOCS_PAGE = ROOT / "docs" / "benchmarks.md"
RECORD = ROOT / "benchmarks" / "results" / "overlap-cpu.json"
MODES: dict[str, list[str]] = {
    "sync": [],
    "one_step_off": ["overlap.mode=one_step_off", "max_staleness=1"],
    "async, 2": ["overlap.mode=async", "max_staleness=2"],
    "async, 2, no partial rollouts": [
        "overlap.mode=async",
        "max_staleness=2",
        "overlap.partial_rollouts=false",
    ],
}
_SETTINGS = ["evaluation.every=0", "observe.show_rollout_every=0"]
_QUICK = ["steps=4", "batch.prompts_per_step=8", "evaluation.problems=8"]
# The first step of a run has nothing before it to overlap with.
_WARM_UP = 2


def run_mode(mode: str, seed: int, quick: bool) -> dict[str, Any]:
    """One run and what its metrics say."""
    overrides = [*_SETTINGS, *MODES[mode], f"seed={seed}", *(_QUICK if quick else [])]
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "opd_megatron", "run", "demo", "--run-dir", str(run)]
        done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{mode}: exit code {done.returncode}\n{done.stdout[-3000:]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    asked = {"mode": mode, "seed": seed, "overrides": overrides, "load_average_at_start": load}
    return {**asked, **_figures(rows, summary)}


def _figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    steps = [row for row in rows if row["step"] > _WARM_UP]

    def over_steps(name: str) -> float:
        return mean(row[name] for row in steps)

    return {
        "steps": summary["steps"],
        "step_s": [row["perf/step_s"] for row in steps],
        "learner_s": over_steps("perf/learner_s"),
        "token_age_mean": over_steps("offpolicy/token_age_mean"),
        "age_max": max(row["offpolicy/age_max"] for row in steps),
        "mixed_frac": over_steps("offpolicy/mixed_frac"),
        "masked_frac": over_steps("offpolicy/masked_frac"),
        "accuracy_before": summary["accuracy_before"],
        "accuracy": summary["accuracy_after"],
        "kl": summary["kl_after"],
        "rejected": summary["ledger"]["rejected"],
    }


def _spread(values: list[float], spec: str) -> str:
    text = format(mean(values), spec)
    return text if len(values) < 2 else f"{text} ± {format(stdev(values), spec)}"


def to_markdown(record: dict[str, Any]) -> str:
    machine = record["environment"]
    head = (
        f"- {machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, torch {machine['torch']}; commit "
        f"{machine['commit']}, {machine['date']} (the last run)\n"
        f"- Per mode: mean ± standard deviation over the seeds; seconds: median over the steps after step {_WARM_UP}\n"
    )
    rows: list[list[str]] = []
    for mode in MODES:
        runs = [run for run in record["runs"] if run["mode"] == mode]
        if not runs:
            rows.append([mode, *["not measured"] * 9])
            continue
        rows.append(
            [
                mode,
                str(len(runs)),
                _spread([median(run["step_s"]) for run in runs], ".2f"),
                _spread([run["learner_s"] for run in runs], ".2f"),
                f"{mean(run['token_age_mean'] for run in runs):.2f}",
                f"{max(run['age_max'] for run in runs):.0f}",
                f"{mean(run['mixed_frac'] for run in runs):.1%}",
                f"{mean(run['masked_frac'] for run in runs):.2%}",
                f"{_spread([100 * run['accuracy'] for run in runs], '.1f')} %",
                ", ".join(f"{run['load_average_at_start']:.1f}" for run in runs),
            ]
        )
    columns = [
        *("mode, max_staleness", "runs", "s/step", "of it the learner", "mean token age"),
        *("oldest", "samples of several versions", "masked tokens", "final accuracy"),
        "load average at the start",
    ]
    return "\n".join([head, *table(columns, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--only", choices=MODES, help="runs of this mode, added to the record")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each mode, a seed each")
    parser.add_argument("--quick", action="store_true", help="tiny runs, nothing published")
    parser.add_argument("--write-docs", action="store_true", help="publish record and table")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment.describe("cpu"), "runs": []}
    modes = [arguments.only] if arguments.only else list(MODES)
    if arguments.only and RECORD.exists():
        record["runs"] = json.loads(RECORD.read_text())["runs"]
    for _ in range(arguments.repeats):
        for mode in modes:
            seed = sum(run["mode"] == mode for run in record["runs"])
            record["runs"].append(run_mode(mode, seed, arguments.quick))
            print(to_markdown(record), flush=True)
    if arguments.write_docs and not arguments.quick:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        write_between_markers(DOCS_PAGE, "overlap cpu", to_markdown(record))


if __name__ == "__main__":
    main()
