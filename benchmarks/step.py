"""Measure the learner's step: stages, tokens/s, overhead over bare Megatron, memory against the estimate.

    python -m benchmarks.step --device cpu|cuda [--only REGEX] [--quick] [--out FILE.json] [--write-docs]

Per case a student with seeded random weights, a step batch, and two launches of the learner's ranks
(benchmarks/step_worker.py): one for times, one for memory, in which the C library gives freed memory back at once, so
that it counts what was needed. Writes JSON with everything measured and prints Markdown; exit code 1 if a case failed.

Left out: more than one machine, servers, and what a step waits for outside the learner.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, step_report
from benchmarks.case import DEVICES
from benchmarks.report import write_between_markers
from benchmarks.step_cases import SHAPES, StepCase, cases, write_step_batch, write_student
from opd_megatron.config.schema import LearnerConfig
from opd_megatron.launch.estimate_memory import Batch, estimate_learner
from opd_megatron.megatron.architecture import architecture_of

ROOT = environment.ROOT
DOCS_PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
_TIMEOUT_S = 600
_ERROR_CHARACTERS = 300
# Blocks above this go back to the kernel when they are freed (mallopt(3)).
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--only", default="", help="regular expression on the case's name")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one repeat: does it run?"
    )
    parser.add_argument("--out", type=Path, help="write the record there as JSON")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="publish: tables into docs/benchmarks.md, record into benchmarks/results/; complete runs only",
    )
    return parser.parse_args(arguments)


def _learner(case: StepCase) -> LearnerConfig:
    return case.recipe(Path()).learner


def _launch(case: StepCase, work: Path, measure: str) -> dict[str, Any]:
    """What the ranks wrote, or {"error": last line of their output}."""
    command = [
        *(sys.executable, "-m", "opd_megatron.megatron.torchrun"),
        *("--nproc-per-node", str(_learner(case).world_size), "-m", "benchmarks.step_worker"),
        *("--case", case.to_json(), "--work", str(work), "--measure", measure),
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if measure == "memory":
        variables |= _GIVE_BACK
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {_TIMEOUT_S} s"}
    if done.returncode == 0:
        return json.loads((work / f"{measure}.json").read_text())
    sys.stderr.write(done.stderr[-4000:])
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    return {"error": (errors or [f"exit code {done.returncode}"])[0][:_ERROR_CHARACTERS]}


def predict(case: StepCase, num_microbatches: int) -> list[dict[str, Any]]:
    """The estimate of every pipeline stage, in bytes by term."""
    arch = architecture_of(SHAPES[case.shape].config())
    batch = Batch(case.tokens_per_microbatch, num_microbatches)
    stages = estimate_learner(arch, _learner(case), batch, case.device)
    return [{"peak": s.peak, "total": s.total, "terms": s.terms} for s in stages]


def measure_case(case: StepCase) -> dict[str, Any]:
    """Both launches of a case, and the estimate."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_student(work / "student", SHAPES[case.shape], case.seed)
        write_step_batch(work / "batch.safetensors", case)
        measured = {kind: _launch(case, work, kind) for kind in ("time", "memory")}
    failed = next((m["error"] for m in measured.values() if "error" in m), None)
    if failed is not None:
        return {"case": json.loads(case.to_json()), "error": failed}
    predicted = predict(case, measured["memory"]["num_microbatches"])
    return {"case": json.loads(case.to_json()), **measured, "predicted": predicted}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    chosen = [c for c in cases(args.device, quick=args.quick) if re.search(args.only, c.name)]
    if not chosen:
        raise SystemExit(f"--only {args.only!r}: no case of benchmarks/step_cases.py matches")
    facts = environment.describe(args.device)
    results: list[dict[str, Any]] = []
    for number, case in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
        results.append(measure_case(case))
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.step", *arguments]),
        "environment": facts,
        "results": results,
    }
    text = step_report.render(record)
    print(text)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.write_docs and (args.quick or args.only):
        print("not published: --quick and --only leave something out", file=sys.stderr)
    elif args.write_docs:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"step-{args.device}.json").write_text(json.dumps(record, indent=1) + "\n")
        write_between_markers(DOCS_PAGE, f"step {args.device}", text)
    failed = [result["case"]["name"] for result in results if "error" in result]
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
