"""Measure the loss: ours, the obvious ways, and the peers that are packaged, in one run.

    python -m benchmarks.loss --device cpu|cuda [--tokens T] [--vocab V] [--topk 16,64,128] [--quick]
                              [--out FILE.json] [--write-docs]

One process per method, one after the other, on the same seeded tensors (a digest proves it). Peers
run in `.venv-peers`, which benchmarks/peers.sh installs; nothing of theirs is in this repository.
Writes JSON with everything measured and prints Markdown; exit code 1 if a method failed.

Left out: several GPUs, tensor parallelism (the tests have it), peers that are not packaged.
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

from benchmarks import catalog, environment, report
from benchmarks.case import DEVICES, Case
from benchmarks.catalog import Method
from benchmarks.goals import Run

ROOT = environment.ROOT
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
DOCS_PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
QWEN3_VOCAB = 151936
# Tokens, hidden size, timed calls. A CPU run of everything takes minutes at these.
_DEFAULTS = {"cpu": (512, 512, 15), "cuda": (8192, 4096, 30)}
_QUICK_TOKENS = {"cpu": 64, "cuda": 1024}
_QUICK_REPEATS = 3
_METHOD_TIMEOUT_S = 600
_ERROR_CHARACTERS = 300


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--tokens", type=int, help="T (default: 512 on a CPU, 8192 on CUDA)")
    parser.add_argument("--vocab", type=int, default=QWEN3_VOCAB, help="V (default: %(default)s)")
    parser.add_argument("--hidden", type=int, help="H of the head (default: 512, 4096)")
    parser.add_argument(
        "--topk", default="16,64,128", help="supports K, the middle one is the main one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=environment.num_cores())
    parser.add_argument("--only", default="", help="regular expression on family/name")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument(
        "--quick", action="store_true", help="few tokens, few repeats: does it run?"
    )
    parser.add_argument("--out", type=Path, help="write the record there as JSON")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="publish: tables into docs/benchmarks.md, record into benchmarks/results/; complete runs only",
    )
    return parser.parse_args(arguments)


def _case(args: argparse.Namespace) -> Case:
    tokens, hidden, repeats = _DEFAULTS[args.device]
    if args.quick:
        tokens, repeats = _QUICK_TOKENS[args.device], _QUICK_REPEATS
    topk = tuple(sorted(int(k) for k in args.topk.split(",")))
    if not 1 <= topk[0] <= topk[-1] <= args.vocab:
        raise SystemExit(f"--topk {args.topk}: each K must be between 1 and --vocab {args.vocab}")
    return Case(
        device=args.device,
        num_tokens=args.tokens or tokens,
        vocab_size=args.vocab,
        hidden_size=args.hidden or hidden,
        topk=topk,
        seed=args.seed,
        max_repeats=repeats,
    )


def _run_worker(identifier: str, python: str, case: Case, threads: int) -> dict[str, Any]:
    """The worker's result, or {"error": last line of its output}."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [
            python,
            "-m",
            "benchmarks.worker",
            "--method",
            identifier,
            "--case",
            case.to_json(),
        ]
        command += ["--threads", str(threads), "--out", str(out)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=variables,
                capture_output=True,
                text=True,
                timeout=_METHOD_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result after {_METHOD_TIMEOUT_S} s"}
        if done.returncode == 0:
            return json.loads(out.read_text())
    sys.stderr.write(done.stderr)
    last_lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"error": last_lines[-1][:_ERROR_CHARACTERS]}


def _select(args: argparse.Namespace) -> list[Method]:
    methods = [
        method
        for method in catalog.methods_for(args.device)
        if re.search(args.only, catalog.method_id(method))
        and not (args.no_peers and method.kind == catalog.PEER)
    ]
    if not methods:
        raise SystemExit(f"--only {args.only!r}: no method of benchmarks/catalog.py matches")
    if any(method.kind == catalog.PEER for method in methods) and not PEERS_PYTHON.exists():
        raise SystemExit(
            ".venv-peers: not there, the peers run in it; run benchmarks/peers.sh or pass --no-peers"
        )
    return methods


def _check_same_inputs(results: dict[str, dict[str, Any]]) -> None:
    """All methods saw the same bits, or the run is worth nothing."""
    seen = {json.dumps(r["inputs"], sort_keys=True) for r in results.values() if "inputs" in r}
    if len(seen) > 1:
        raise SystemExit("the methods saw different tensors:\n" + "\n".join(sorted(seen)))


def _write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    case, methods = _case(args), _select(args)
    facts = environment.describe(case.device)
    results: dict[str, dict[str, Any]] = {}
    floor = _run_worker("floor", sys.executable, case, args.threads)
    for index, method in enumerate(methods, start=1):
        identifier = catalog.method_id(method)
        python = str(PEERS_PYTHON) if method.kind == catalog.PEER else sys.executable
        print(f"[{index}/{len(methods)}] {identifier}", file=sys.stderr, flush=True)
        results[identifier] = _run_worker(identifier, python, case, args.threads)
    failed = [name for name, result in {"floor": floor, **results}.items() if "error" in result]
    if len(failed) == len(results) + 1:
        raise SystemExit("every method failed; the messages are above")
    _check_same_inputs(results)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.loss", *arguments]),
        "environment": facts,
        "threads": args.threads,
        "case": json.loads(case.to_json()),
        "floor": floor,
        "results": results,
    }
    run = Run(case, results, None if "error" in floor else floor)
    text = report.render(record, run)
    print(text)
    if args.out is not None:
        _write_record(args.out, record)
    if args.write_docs and (args.quick or args.only or args.no_peers):
        print("not published: --quick, --only and --no-peers leave something out", file=sys.stderr)
    elif args.write_docs:
        _write_record(RESULTS / f"loss-{case.device}.json", record)
        report.write_between_markers(DOCS_PAGE, f"loss {case.device}", text)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
