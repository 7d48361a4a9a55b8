"""`report.html`: a run on one page, self-contained, no JavaScript, nothing loaded from elsewhere.

Works on any run directory: what was not recorded is shown as "not recorded". It never judges a
run; the captions say what good looks like. Layout and styles live in `report.html.j2` beside this
file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from opd_megatron import __version__
from opd_megatron.atomic import write_bytes
from opd_megatron.config.schema import Recipe, TeacherConfig
from opd_megatron.observe.coloring import BINS, ColoredRollout, rollout_html
from opd_megatron.observe.formats import human_count, human_duration, human_value
from opd_megatron.observe.metric_table import METRICS
from opd_megatron.observe.panels import SECTIONS
from opd_megatron.observe.plots import draw_panel, draw_time
from opd_megatron.observe.run_files import RunFiles, load_run
from opd_megatron.observe.stages import account_time

REPORT_HTML = "report.html"
NUM_ROLLOUTS = 10


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; empty mappings stay values."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def recipe_difference(recipe: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that differ from the schema's defaults, as `(key, value, default)`."""
    defaults = dataclasses.asdict(Recipe())
    teacher = dataclasses.asdict(TeacherConfig())
    defaults["teachers"] = dict.fromkeys(recipe.get("teachers") or {}, teacher)
    known = flatten(defaults)
    return [
        (key, value, known.get(key))
        for key, value in flatten(recipe).items()
        if key not in known or known[key] != value
    ]


def choose_rollouts(
    rollouts: Sequence[ColoredRollout], count: int = NUM_ROLLOUTS
) -> list[tuple[str, list[ColoredRollout]]]:
    """Half from the beginning of the run, half from its end; in a half, other prompts first.

    Returns:
        `(heading, rollouts)` groups; one group when the run is too short to have two ends.
    """
    ordered = sorted(rollouts, key=lambda rollout: rollout.step)
    if len({rollout.step for rollout in ordered}) < 2:
        return [("Recorded", _one_per_prompt(ordered, count))] if ordered else []
    middle = (ordered[0].step + ordered[-1].step) / 2
    early = _one_per_prompt([r for r in ordered if r.step <= middle], (count + 1) // 2)
    late = _one_per_prompt([r for r in reversed(ordered) if r.step > middle], count // 2)
    return [("Early in the run", early), ("At the end", late)]


def _one_per_prompt(rollouts: Sequence[ColoredRollout], count: int) -> list[ColoredRollout]:
    """The first `count`, other prompts before second responses to the same one."""
    seen: set[str] = set()
    fresh, repeated = [], []
    for rollout in rollouts:
        (repeated if rollout.prompt in seen else fresh).append(rollout)
        seen.add(rollout.prompt)
    return [*fresh, *repeated][:count]


def _headline(run: RunFiles) -> dict[str, float | None]:
    """Numbers of summary.json, or what the metrics say when the run did not get that far."""
    accuracy, kl = "eval/heldout/accuracy", "eval/heldout/kl_reverse"
    several = len(run.series(accuracy)[0]) > 1
    from_rows = {
        "accuracy_before": run.first(accuracy),
        "accuracy_after": run.last(accuracy) if several else None,
        "teacher_accuracy": run.last("eval/heldout/teacher_accuracy"),
        "kl_before": run.first(kl),
        "kl_after": run.last(kl) if several else None,
        "steps": float(run.rows[-1]["step"]) if run.rows else None,
        "wall_s": run.rows[-1]["time_s"] - run.rows[0]["time_s"] if run.rows else None,
        "tokens": sum(run.series("train/tokens")[1]) or None,
    }
    return {key: run.summary.get(key, value) for key, value in from_rows.items()}


def _status(run: RunFiles) -> tuple[str, bool]:
    """What became of the run, and whether it is complete."""
    planned = run.recipe.get("steps")
    reached = run.rows[-1]["step"] if run.rows else 0
    if run.summary:
        return f"finished, {run.summary.get('steps', reached)} steps", True
    if not run.rows:
        return "no step recorded", False
    return f"not finished: step {reached} of {planned or 'unknown'} is the last one recorded", False


def _data_account(run: RunFiles) -> dict[str, Any]:
    """Ledger totals and rejected rows, from summary.json or else from the last rows."""
    names = ("issued", "trained", "rejected", "in_flight")
    ledger = run.summary.get("ledger")
    if not isinstance(ledger, Mapping):
        last = {name: run.last(f"data/prompts_{name}") for name in names}
        ledger = {name: int(value) for name, value in last.items() if value is not None}
    rows = run.summary.get("data")
    return {"ledger": flatten(ledger) if ledger else {}, "rows": flatten(rows) if rows else {}}


def _metric_rows(run: RunFiles) -> list[dict[str, Any]]:
    recorded = [(metric, run.series(metric.name)[1]) for metric in METRICS]
    return [
        {
            "metric": metric,
            "numbers": [
                human_value(number, metric.unit)
                for number in (values[0], min(values), max(values), values[-1])
            ],
        }
        for metric, values in recorded
        if values
    ]


def render_report(run_dir: Path) -> Path:
    """Write the report of a run, complete or not.

    Args:
        run_dir: the run directory.

    Returns:
        Path of `run_dir/report.html`.
    """
    run = load_run(run_dir)
    sections = [
        (section.question, [(panel, draw_panel(panel, run)) for panel in section.panels])
        for section in SECTIONS
    ]
    status, finished = _status(run)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "duration": human_duration,
        "count": human_count,
        "value": human_value,
        "svg": Markup,
        "tokens": rollout_html,
    }
    template = files("opd_megatron.observe").joinpath("report.html.j2").read_text()
    page = environment.from_string(template).render(
        run=run,
        name=run.recipe.get("name") or run_dir.resolve().name,
        status=status,
        finished=finished,
        headline=_headline(run),
        sections=sections,
        time=account_time(run.rows),
        time_svg=draw_time(run),
        rollouts=choose_rollouts(run.rollouts),
        bins=BINS,
        difference=recipe_difference(run.recipe) if run.recipe else [],
        data=_data_account(run),
        environment=flatten(run.environment) if run.environment else {},
        metric_rows=_metric_rows(run),
        version=__version__,
    )
    path = run_dir / REPORT_HTML
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path
