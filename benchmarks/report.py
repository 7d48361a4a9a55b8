"""A run as Markdown: hardware, goals, one table a family, the sweep over K; and its place in docs.

docs/benchmarks.md holds, per benchmark and device, a pair of markers. What stands between them is replaced, the
rest is written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import catalog
from benchmarks.catalog import Method
from benchmarks.goals import Run, goals

_TITLES = {
    catalog.LOGITS: "Stored logits: top-K forward KL, sampled log-prob, entropy",
    catalog.HEAD: "From hidden states: the same loss, the head's products included",
    catalog.DENSE_LOGITS: "Dense teacher, both logits stored: reverse KL over the vocabulary",
    catalog.DENSE_HEAD: "Dense teacher from hidden states, both heads' products included",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _method_row(run: Run, method: Method) -> list[str]:
    identifier = catalog.method_id(method)
    result = run.results.get(identifier)
    if result is None:
        return [method.name, method.gives, *["not run"] * 5]
    name = method.name
    if result.get("package_version"):
        name += f" ({method.package} {result['package_version']})"
    row = run.at(identifier)
    if row is None:
        return [name, method.gives, "failed: " + result["error"], *["-"] * 4]
    naive_s = run.seconds(f"{method.family}/naive", "min")
    seconds = row["seconds"]
    every = [f + b for f, b in zip(seconds["all_forward"], seconds["all_backward"], strict=True)]
    return [
        name,
        method.gives,
        f"{_milliseconds(seconds['min'])} / {_milliseconds(seconds['median'])} / "
        f"{_milliseconds(max(every))} ({len(every)})",
        "-" if naive_s is None else f"{naive_s / seconds['min']:.2f}x",
        f"{row['extra_peak_L']:.2f}",
        f"{row['extra_peak_bytes'] / 2**20:,.0f}",
        f"{row['gradient_relative_error']:.1e}",
    ]


def _family(run: Run, family: str) -> list[str]:
    methods = [m for m in catalog.methods_for(run.case.device) if m.family == family]
    header = [
        *(
            "method",
            "gives",
            "forward + backward, ms: min / median / max (calls)",
            "speed over naive",
        ),
        *("extra peak, L", "extra peak, MiB", "gradient error"),
    ]
    rows = [_method_row(run, method) for method in methods]
    note: list[str] = []
    if family in (catalog.HEAD, catalog.DENSE_HEAD):
        gradients = run.case.hidden_size * (run.case.num_tokens + run.case.vocab_size)
        share = 2 * gradients / run.case.logits_bytes
        note = [f"The bfloat16 gradients of hidden states and weight alone are {share:.2f} L.", ""]
    return [f"**{_TITLES[family]}**", "", *note, *table(header, rows), ""]


def _sweep(run: Run) -> list[str]:
    methods = [m for m in catalog.methods_for(run.case.device) if m.sweeps_topk]
    topks = sorted(run.case.topk)
    rows: list[list[str]] = []
    for method in methods:
        identifier = catalog.method_id(method)
        seconds = [run.seconds(identifier, "min", topk) for topk in topks]
        measured = [s for s in seconds if s is not None]
        if len(measured) == len(topks):
            growth = 100 * (measured[-1] / measured[0] - 1)
            rows.append([method.name, *map(_milliseconds, measured), f"{growth:+.1f} %"])
    header = ["method", *(f"K = {topk}, ms" for topk in topks), "growth"]
    return ["**Support size** (minima)", "", *table(header, rows), ""]


def _hardware(facts: dict[str, Any], run: Run, threads: int) -> list[str]:
    case = run.case
    machine = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB"
    if case.device == "cuda":
        machine = f"{facts['gpu']} (driver {facts['driver']}); host {machine}"
    inputs = next(r["inputs"] for r in run.results.values() if "inputs" in r)
    lines = [
        f"- {machine}; {threads} threads; Linux {facts['kernel']}; Python {facts['python']}, torch "
        f"{facts['torch']}, megatron-core {facts['megatron-core']}, transformers {facts['transformers']}",
        f"- commit {facts['commit']}, {facts['date']}, load average at the start "
        f"{facts['load_average_at_start']}",
        f"- T = {case.num_tokens:,}, V = {case.vocab_size:,}, H = {case.hidden_size:,}, "
        f"K = {case.main_topk} unless said; seed {case.seed}; L = {case.logits_bytes / 2**20:,.1f} MiB",
        f"- entropy: student {inputs['student_entropy_nats']}, teacher "
        f"{inputs['teacher_entropy_nats']} nats; student mass on the largest support "
        f"{inputs['student_mass_on_support']}",
    ]
    if run.floor is not None:
        lines.append(
            f"- copy bandwidth {run.floor['copy_bytes_per_s'] / 1e9:,.1f} GB/s (read + write); the head's "
            f"three matrix products {_milliseconds(run.floor['three_matmuls_s'])} ms, "
            f"{run.floor['three_matmuls_flops_per_s'] / 1e12:,.2f} TFLOP/s"
        )
    return lines


def render(record: dict[str, Any], run: Run) -> str:
    """The whole report of one run, as Markdown."""
    goal_rows = [
        [
            goal.text,
            "-" if goal.value is None else f"{goal.value:.2f} {goal.unit}",
            f"{'<=' if goal.at_most else '>='} {goal.limit:.3g} {goal.unit}",
            goal.verdict,
        ]
        for goal in goals(run)
    ]
    lines = [*_hardware(record["environment"], run, record["threads"]), ""]
    lines += [f"Command: `{record['command']}`", ""]
    lines += [*table(["goal", "measured", "target", ""], goal_rows), ""]
    for family in catalog.FAMILIES:
        lines += _family(run, family)
    return "\n".join([*lines, *_sweep(run)])


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME begin -->` and `<!-- NAME end -->` in a page.

    Args:
        name: benchmark and device, e.g. "loss cpu".

    Raises:
        ValueError: the page lacks one of the markers.
    """
    page = path.read_text()
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path}: one '{begin}' and one '{end}' wanted, put them back")
    head, rest = page.split(begin)
    _, tail = rest.split(end)
    path.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}")
