"""Measure what the top-K of a served teacher costs a whole step: runs that differ in K alone.

    python -m benchmarks.transport_step [--steps N] [--repeats N] [--quick] [--write-docs]

`benchmarks.transport` measures one request at a time. Here scores come while other groups are generated, and what K
adds to the step is the difference of two steps. Runs are those of `recipes/demo.py` with random weights and 4,096
tokens in place of 32, so that a top-64 is not the vocabulary; every response has full length. Both models have the
demo's size, and a larger one, since a list costs the same whatever model made it. Runs take turns, so that a machine
that gets slower meanwhile is no advantage.

Left out: GPUs, and responses of thousands of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import environment
from benchmarks.report import table, write_between_markers
from benchmarks.transport_report import GOAL_SHARE

ROOT = environment.ROOT
DOCS_PAGE = ROOT / "docs" / "transport.md"
RECORD = ROOT / "benchmarks" / "results" / "transport-step-cpu.json"
VOCAB = 4096
TOPK = (1, 64)
MODES: dict[str, list[str]] = {
    "sync": [],
    "one_step_off": ["overlap.mode=one_step_off", "max_staleness=1"],
}
SIZES: dict[str, dict[str, int]] = {
    "demo": {},
    "larger": {
        **{"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
    },
}
_SETTINGS = [
    *("objective.estimator=support_matching", "objective.support=teacher_topk"),
    *("objective.measure=tail_bucket", "data.heldout=", "observe.show_rollout_every=0"),
    *("alarms.truncation=none", "alarms.repetition=none", "checkpoint.every=1000"),
]
_WARM_UP = 3
_PARTS = ("step", "learner", "rollout", "teacher")


def write_models(folder: Path, size: str) -> tuple[dict[str, Path], int]:
    """The demo's student and teacher at a size, with random weights; how many the student has."""
    made: dict[str, Path] = {}
    weights = 0
    for seed, name in enumerate(("student", "teacher")):
        source = ROOT / "recipes" / "demo" / name
        made[name] = folder / name
        shutil.copytree(source, made[name])
        (made[name] / "model.safetensors").unlink()
        torch.manual_seed(seed)
        config = Qwen3Config.from_pretrained(source, vocab_size=VOCAB)
        config.update(SIZES[size])
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        model = Qwen3ForCausalLM(config).float()
        model.save_pretrained(made[name])
        weights = weights or sum(parameter.numel() for parameter in model.parameters())
    return made, weights


def run_once(
    models: dict[str, Path], size: str, mode: str, topk: int, steps: int, seed: int
) -> dict[str, Any]:
    """One run; seconds of each step after the first ones, by part."""
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = [
            *(f"student.path={models['student']}", f"teachers.main.path={models['teacher']}"),
            *(f"objective.topk={topk}", f"steps={steps}", f"seed={seed}"),
        ]
        command = [sys.executable, "-m", "opd_megatron", "run", "demo", "--run-dir", str(run)]
        command += [*_SETTINGS, *MODES[mode], *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(
                f"{size}, {mode}, K = {topk}: exit code {done.returncode}\n{done.stdout[-3000:]}"
            )
        lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] > _WARM_UP]
    seconds = {part: [row[f"perf/{part}_s"] for row in rows] for part in _PARTS}
    tokens = mean(row["train/tokens"] for row in rows)
    asked = {"size": size, "mode": mode, "topk": topk, "seed": seed, "load_average_at_start": load}
    return {**asked, "tokens": tokens, "seconds": seconds}


def of_mode(record: dict[str, Any], size: str, mode: str, topk: int, part: str) -> float:
    """Median seconds of a part of the step, over the steps of all runs of that size and mode with that K."""
    runs = [r for r in record["runs"] if (r["size"], r["mode"], r["topk"]) == (size, mode, topk)]
    return median(second for run in runs for second in run["seconds"][part])


def added(record: dict[str, Any], size: str, mode: str, part: str) -> float:
    """Seconds that the larger K adds to a part of the step."""
    small, large = TOPK
    return of_mode(record, size, mode, large, part) - of_mode(record, size, mode, small, part)


def to_markdown(record: dict[str, Any]) -> str:
    machine = record["environment"]
    tokens = mean(run["tokens"] for run in record["runs"])
    head = [
        f"- {machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, torch {machine['torch']}; commit "
        f"{machine['commit']}, {machine['date']}",
        f"- V = {VOCAB:,}, {tokens:,.0f} response tokens a step; medians over the steps after step {_WARM_UP}, "
        f"{record['repeats']} runs each; load average at the start of a run "
        f"{max(run['load_average_at_start'] for run in record['runs'])} at most",
        "",
        f"Command: `{record['command']}`",
        "",
    ]
    cases = [(size, mode) for size in SIZES for mode in MODES]
    rows = [
        [
            f"{record['weights'][size] / 1e6:.1f} M",
            *(mode, str(k)),
            *(f"{of_mode(record, size, mode, k, part):.3f}" for part in _PARTS),
        ]
        for size, mode in cases
        for k in TOPK
    ]
    said: list[str] = []
    for size, mode in cases:
        share = added(record, size, mode, "step") / of_mode(record, size, mode, TOPK[0], "step")
        verdict = "met" if share <= GOAL_SHARE else "missed"
        more = {part: f"{added(record, size, mode, part):+.3f} s" for part in _PARTS}
        said.append(
            f"- {record['weights'][size] / 1e6:.1f} M weights, `{mode}`: top-{TOPK[1]} in place of top-{TOPK[0]} adds "
            f"{more['step']}, {share:+.1%} of the step (goal {GOAL_SHARE:.0%}: {verdict}); the learner's own part "
            f"grows by {more['learner']}, what comes after the last response by {more['teacher']}."
        )
    columns = ["student's weights", "mode", "K", *(f"{part}, s" for part in _PARTS)]
    return "\n".join([*head, *table(columns, rows), "", *said])


def main() -> None:
    arguments = sys.argv[1:]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each mode and K")
    parser.add_argument("--quick", action="store_true", help="a few steps, nothing published")
    parser.add_argument("--write-docs", action="store_true", help="publish record and table")
    args = parser.parse_args()
    steps, repeats = (_WARM_UP + 2, 1) if args.quick else (args.steps, args.repeats)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.transport_step", *arguments]),
        "environment": environment.describe("cpu"),
        "repeats": repeats,
        "weights": {},
        "runs": [],
    }
    for seed in range(repeats):
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                models, record["weights"][size] = write_models(Path(folder), size)
                for mode in MODES:
                    for topk in TOPK:
                        record["runs"].append(run_once(models, size, mode, topk, steps, seed))
                        seconds = of_mode(record, size, mode, topk, "step")
                        print(size, mode, topk, seconds, file=sys.stderr)
    print(to_markdown(record))
    if args.write_docs and not args.quick:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        write_between_markers(DOCS_PAGE, "transport step", to_markdown(record))


if __name__ == "__main__":
    main()
