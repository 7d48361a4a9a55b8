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
from opd_megatron.observe.panels import SECTIONS, Panel, Section
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
    summary = run.summary if is_finished(run) else {}
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
    return {key: summary.get(key, value) for key, value in from_rows.items()}


def is_finished(run: RunFiles) -> bool:
    """A summary is there, and no later attempt set out to go beyond it."""
    steps = run.summary.get("steps", 0)
    reached = run.rows[-1]["step"] if run.rows else 0
    return bool(run.summary) and max(reached, run.recipe.get("steps", 0)) <= steps


def _status(run: RunFiles) -> str:
    planned = run.recipe.get("steps")
    reached = run.rows[-1]["step"] if run.rows else 0
    if is_finished(run):
        return f"finished, {run.summary.get('steps', reached)} steps"
    if not run.rows:
        return "no step recorded"
    return f"not finished: step {reached} of {planned or 'unknown'} is the last one recorded"


def _ledger(run: RunFiles) -> list[tuple[str, str]]:
    """Totals of the prompt ledger in words, from summary.json or else from the last row."""
    names = ("issued", "trained", "rejected", "in_flight")
    ledger = run.summary.get("ledger") if is_finished(run) else None
    if not isinstance(ledger, Mapping):
        last = {name: run.last(f"data/prompts_{name}") for name in names}
        ledger = {name: int(value) for name, value in last.items() if value is not None}
    return [(name.replace("_", " "), counted(ledger[name])) for name in names if name in ledger]


def counted(value: Any) -> str:
    """A number, or numbers by reason: `3: broken json 2, over long 1`."""
    if not isinstance(value, Mapping):
        return str(value)
    by_reason = [f"{str(reason).replace('_', ' ')} {count}" for reason, count in value.items()]
    return f"{sum(value.values())}: {', '.join(by_reason)}" if by_reason else "0"


def _prompt_files(run: RunFiles) -> list[dict[str, Any]]:
    """The prompt files with their refused rows, from inputs.json."""
    found = [(key, account) for key, account in run.inputs.items() if isinstance(account, Mapping)]
    return [
        {
            "key": key,
            "rows": account.get("rows"),
            "used": account.get("used"),
            "rejected": counted(account.get("rejected") or {}),
            "examples": account.get("examples") or [],
        }
        for key, account in found
    ]


def _settings(run: RunFiles) -> dict[str, str]:
    """What was trained and how it was evaluated, in words; empty where run.yaml lacks it."""
    try:
        return {"trained": _trained_words(run.recipe), "evaluated": _evaluated_words(run)}
    except KeyError:  # a run.yaml of another version, or none
        return {"trained": "", "evaluated": ""}


def _trained_words(recipe: Mapping[str, Any]) -> str:
    objective = recipe["objective"]
    words = f"{objective['divergence']} by {objective['estimator']}"
    if objective["estimator"] in ("support_matching", "topk_surrogate"):
        words += f" on {objective['support']}, K={objective['topk']}, {objective['measure']}"
    kind = recipe["correction"]["kind"]
    words += f", discount {objective['discount']:g}, {kind} importance weights"
    task, updates = recipe["task"], recipe["batch"]["updates_per_step"]
    if task["coefficient"]:
        words += f", task {task['grader']} x {task['coefficient']:g}"
    return words + (f", {updates} updates a step" if updates > 1 else "")


def _evaluated_words(run: RunFiles) -> str:
    evaluation, rollout = run.recipe["evaluation"], run.recipe["rollout"]
    # Without the whole vocabulary there is no forward KL: see eval/evaluate.py.
    is_exact = run.last("eval/heldout/kl_forward") is not None
    how = "exact over the vocabulary" if is_exact else "estimated from the sampled tokens"
    return (
        f"up to {evaluation['problems']} problems x {evaluation['samples_per_problem']} samples, "
        f"temperature {evaluation['temperature']:g}, at most {rollout['max_new_tokens']} new tokens, "
        f"grader {evaluation['grader']}; KL on up to {evaluation['kl_problems']} of the problems, {how}"
    )


def draw_section(section: Section, run: RunFiles) -> list[tuple[Panel, str | None]]:
    """Panels with their pictures, None where nothing was recorded."""
    drawn = [(panel, draw_panel(panel, run)) for panel in section.panels]
    return [(panel, svg) for panel, svg in drawn if svg is not None or not section.optional]


def _metric_rows(run: RunFiles) -> list[dict[str, Any]]:
    recorded = [
        (dataclasses.replace(metric, name=name), run.series(name)[1])
        for metric in METRICS
        for name in run.names(metric.name)
    ]
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
    sections = [(section.question, draw_section(section, run)) for section in SECTIONS]
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
        status=_status(run),
        finished=is_finished(run),
        headline=_headline(run),
        settings=_settings(run),
        sections=[(question, panels) for question, panels in sections if panels],
        time=account_time(run.rows),
        time_svg=draw_time(run),
        rollouts=choose_rollouts(run.rollouts),
        bins=BINS,
        difference=recipe_difference(run.recipe) if run.recipe else [],
        ledger=_ledger(run),
        prompt_files=_prompt_files(run),
        environment=flatten(run.environment) if run.environment else {},
        metric_rows=_metric_rows(run),
        version=__version__,
    )
    path = run_dir / REPORT_HTML
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path
