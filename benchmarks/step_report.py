"""A run of benchmarks/step.py as Markdown: hardware, times by stage, overhead, memory against the estimate."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.report import table
from benchmarks.step_cases import SHAPES, StepCase

_STAGES = ("read and pack", "forward and backward", "reduce and norm", "optimizer", "other")
GOAL_OVERHEAD = 0.05


def overhead(result: dict[str, Any]) -> float | None:
    """Our step without its optimizer over the bare one, minus 1; the median over pairs of neighbours."""
    ours, bare = result["time"]["ours_s"], result["time"]["bare_s"]
    if not bare:
        return None
    return median(a / b for a, b in zip(ours, bare, strict=True)) - 1


def largest_rank(result: dict[str, Any]) -> tuple[int, int]:
    """(measured, predicted) bytes of the rank that needed most."""
    rank = max(result["memory"]["ranks"], key=lambda r: r["bytes"])
    return rank["bytes"], result["predicted"][rank["stage"]]["total"]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.01 else f"{1000 * seconds:,.1f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def _time_row(result: dict[str, Any]) -> list[str]:
    case, time = StepCase(**result["case"]), result["time"]
    step_s = median(time["step_s"])
    stages = time["stages_s"]
    found = overhead(result)
    return [
        case.name,
        f"{case.num_tokens / step_s:,.0f}",
        _milliseconds(step_s),
        *(_milliseconds(stages.get(name, 0.0)) for name in _STAGES),
        _milliseconds(time["publish_s"]),
        _milliseconds(time["save_s"]),
        _milliseconds(median(time["bare_s"])) if time["bare_s"] else "-",
        "-" if found is None else f"{found:+.1%}",
    ]


def _memory_row(result: dict[str, Any]) -> list[str]:
    measured, predicted = largest_rank(result)
    rank = max(result["memory"]["ranks"], key=lambda r: r["bytes"])
    stage = result["predicted"][rank["stage"]]
    return [
        result["case"]["name"],
        _mib(measured),
        _mib(predicted),
        f"{predicted / measured - 1:+.1%}",
        stage["peak"],
        *(_mib(size) for size in stage["terms"].values()),
    ]


def _shape(name: str) -> str:
    s = SHAPES[name]
    tied = ", tied" if s.tied else ""
    return (
        f"{name} (h {s.hidden}, {s.layers} layers, {s.heads}/{s.kv_heads} heads of {s.head}, f {s.ffn}, "
        f"V {s.vocab:,}{tied})"
    )


def _head(record: dict[str, Any], good: list[dict[str, Any]]) -> list[str]:
    facts, case = record["environment"], StepCase(**record["results"][0]["case"])
    machine = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB"
    if case.device == "cuda":
        machine = f"{facts['gpu']} (driver {facts['driver']}); host {machine}"
    shapes = sorted({result["case"]["shape"] for result in record["results"]})
    overheads = [found for r in good if (found := overhead(r)) is not None]
    lines = [
        f"- {machine}; Linux {facts['kernel']}; Python {facts['python']}, torch {facts['torch']}, megatron-core "
        f"{facts['megatron-core']}",
        f"- commit {facts['commit']}, {facts['date']}, load average at the start {facts['load_average_at_start']}",
        f"- students: {'; '.join(map(_shape, shapes))}",
        f"- {case.samples} samples of {case.prompt} + {case.response} tokens a step, at most "
        f"{case.tokens_per_microbatch:,} tokens a micro-batch; {case.precision}; {case.repeats} repeats",
        "",
        f"Command: `{record['command']}`",
        "",
    ]
    if overheads:
        within = sum(found <= GOAL_OVERHEAD for found in overheads)
        lines += [
            f"Overhead over the bare step: median {median(overheads):+.1%}, largest {max(overheads):+.1%}; within the "
            f"goal of {GOAL_OVERHEAD:.0%} in {within} of {len(overheads)} cases.",
            "",
        ]
    return lines


def render(record: dict[str, Any]) -> str:
    """The tables of one run."""
    good = [result for result in record["results"] if "error" not in result]
    lines = _head(record, good)
    if good:
        header = [
            "case",
            "tokens/s",
            "step, ms",
            *_STAGES,
            "publish",
            "save",
            "bare, ms",
            "overhead",
        ]
        lines += [*table(header, [_time_row(result) for result in good]), ""]
        terms = list(good[0]["predicted"][0]["terms"])
        header = ["largest rank, MiB", "measured", "estimate", "error", "peak at", *terms]
        lines += [*table(header, [_memory_row(result) for result in good]), ""]
        errors = [abs(p / m - 1) for m, p in map(largest_rank, good)]
        lines += [
            f"Error of the estimate: median {median(errors):.1%}, largest {max(errors):.1%}.",
            "",
        ]
    failed = [r for r in record["results"] if "error" in r]
    lines += [f"- {result['case']['name']}: failed: {result['error']}" for result in failed]
    return "\n".join(lines)
