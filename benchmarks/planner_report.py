"""Predicted against measured, as Markdown: whole runs on a CPU, learner memory, published figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.planner_cases import CALIBRATION, RUNS, RunCase
from benchmarks.planner_published import published
from benchmarks.report import table
from opd_megatron.config.recipes import load_recipe, override_recipe
from opd_megatron.config.schema import Recipe
from opd_megatron.launch.planner.hardware import Device, Overheads
from opd_megatron.launch.planner.plan import models_of
from opd_megatron.launch.planner.stages import Lengths, StepTime, step_time

# Arithmetic of models this small takes no time beside the overheads, so the peaks are set out of reach.
_FREE = 1e18
_PROMPT_TOKENS = 8


def _recipe(case: RunCase) -> Recipe:
    return override_recipe(load_recipe("demo")[0], case.overrides)


def _lengths(run: dict[str, Any]) -> Lengths:
    return Lengths(_PROMPT_TOKENS, max(1, round(run["len_mean"])))


def calibrate(runs: dict[str, Any]) -> Device:
    """The machine as two runs describe it: two equations for rollout and for the learner, one for the others."""
    large, small = (runs[case.name] for case in CALIBRATION)
    samples = [_recipe(case).batch.samples_per_step for case in CALIBRATION]

    def line(y: Sequence[float], x: Sequence[float]) -> tuple[float, float]:
        slope = max(0.0, (y[0] - y[1]) / (x[0] - x[1]))
        return max(0.0, y[1] - slope * x[1]), slope

    steps = [run["rollout"] / _lengths(run).response for run in (large, small)]
    decode_step_s, decode_sequence_s = line(steps, samples)
    tokens = [n * _lengths(run).total for n, run in zip(samples, (large, small), strict=True)]
    learner_step_s, learner_token_s = line([large["learner"], small["learner"]], tokens)
    overheads = Overheads(
        decode_step_s=decode_step_s,
        decode_sequence_s=decode_sequence_s,
        prefill_s=large["teacher"] / samples[0],
        learner_step_s=learner_step_s,
        learner_token_s=learner_token_s,
        sync_s=median(run["publish"] + run["sync"] for run in (large, small)),
    )
    return Device("cpu", _FREE, _FREE, _FREE, _FREE, 1, {"bf16": _FREE}, overheads)


def predict_run(case: RunCase, run: dict[str, Any], device: Device) -> StepTime:
    """The planner's step for a run's settings and its mean length. Evaluation is not part of a step's time."""
    recipe = _recipe(case)
    recipe = replace(recipe, data=replace(recipe.data, heldout=""))
    return step_time(recipe, models_of(recipe), device, _lengths(run))


def _shares(rollout: float, teacher: float, learner: float, sync: float) -> str:
    total = rollout + teacher + learner + sync
    return " / ".join(f"{100 * part / total:.0f}" for part in (rollout, teacher, learner, sync))


def _run_rows(runs: dict[str, Any]) -> tuple[list[list[str]], list[float], list[float]]:
    device = calibrate(runs)
    rows: list[list[str]] = []
    step_errors: list[float] = []
    share_errors: list[float] = []
    for case in (*CALIBRATION, *RUNS):
        run = runs.get(case.name)
        if run is None or "error" in run:
            rows.append([case.name, "not run" if run is None else "failed", *["-"] * 4])
            continue
        time = predict_run(case, run, device)
        measured = [run["rollout"], run["teacher"], run["learner"], run["publish"] + run["sync"]]
        expected = [time.rollout, time.teacher_left, time.learner, time.sync]
        error = sum(expected) / sum(measured) - 1
        is_calibration = case in CALIBRATION
        if not is_calibration:
            step_errors.append(abs(error))
            pairs = zip(measured, expected, strict=True)
            share_errors.append(max(abs(m / sum(measured) - e / sum(expected)) for m, e in pairs))
        rows.append(
            [
                case.name + (" (calibration)" if is_calibration else ""),
                f"{sum(measured):.2f}",
                f"{sum(expected):.2f}",
                f"{error:+.0%}",
                _shares(*measured),
                _shares(*expected),
            ]
        )
    return rows, step_errors, share_errors


def _memory_rows(memory: dict[str, Any]) -> tuple[list[list[str]], list[float]]:
    rows: list[list[str]] = []
    errors: list[float] = []
    for name, found in memory.items():
        if "error" in found:
            rows.append([name, "failed", "-", "-"])
            continue
        measured, predicted = found["measured"], found["predicted"]
        errors.append(abs(predicted / measured - 1))
        mib = [f"{size / 2**20:,.0f}" for size in (measured, predicted)]
        rows.append([name, *mib, f"{predicted / measured - 1:+.1%}"])
    return rows, errors


def _errors(errors: Sequence[float]) -> str:
    return (
        f"median {median(errors):.1%}, largest {max(errors):.1%}" if errors else "nothing measured"
    )


def render(record: dict[str, Any]) -> str:
    """The tables of docs/planner.md."""
    lines: list[str] = []
    facts = record.get("environment")
    if facts:
        lines += [
            f"{facts['cpu']}, {facts['cores']} cores; torch {facts['torch']}; commit {facts['commit']}, "
            f"{facts['date']}, load average at the start {facts['load_average_at_start']} (other work ran beside it).",
            "",
        ]
    lines += ["**Whole runs on a CPU**", ""]
    if all(case.name in record["runs"] for case in CALIBRATION):
        rows, step_errors, share_errors = _run_rows(record["runs"])
        header = [
            "demo, prompts x rollouts", "stages, s: measured", "predicted", "error",
            "rollout / teacher / learner / sync, %: measured", "predicted",
        ]  # fmt: skip
        lines += [*table(header, rows), ""]
        points = [100 * error for error in share_errors]
        shares = f"median {median(points):.0f}, largest {max(points):.0f} points" if points else "-"
        lines += [
            f"Error of the seconds of a step, calibration left out: {_errors(step_errors)}; of the share of a stage "
            f"(the worst of the four): {shares}.",
            "",
        ]
    else:
        lines += ["Not run yet.", ""]
    rows, errors = _memory_rows(record["memory"])
    lines += ["**Memory of the largest learner rank on a CPU**", ""]
    header = ["case", "measured, MiB", "estimate, MiB", "error"]
    lines += (
        [*table(header, rows), "", f"Error: {_errors(errors)}.", ""]
        if rows
        else ["Not run yet.", ""]
    )
    lines += ["**Published figures**", ""]
    rows = [
        [
            p.what,
            f"{p.measured:,.0f} {p.unit}",
            f"{p.predicted:,.0f}",
            f"{p.predicted / p.measured - 1:+.0%}",
            p.source,
        ]
        for p in published()
    ]
    return "\n".join([*lines, *table(["what", "published", "model", "error", "source"], rows), ""])
