"""A made-up but realistic run directory, for tests of the report and for looking at the page.

`PYTHONPATH=. python tests/unit/observe/synthetic_run.py FOLDER` writes FOLDER and its report.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import yaml

from opd_megatron.config.schema import BatchConfig, Recipe, StudentConfig, TeacherConfig
from opd_megatron.observe.coloring import ROLLOUTS_JSONL, ColoredRollout
from opd_megatron.observe.environment import describe_environment
from opd_megatron.observe.jsonl import JsonlWriter
from opd_megatron.observe.report import render_report
from opd_megatron.observe.writer import METRICS_JSONL, MetricsWriter

EVAL_EVERY = 10
START_S = 1_760_000_000.0
INPUTS = {
    "data.train": {
        "file": "demo/train.jsonl",
        "rows": 7091,
        "used": 7088,
        "rejected": {"broken_json": 2, "over_long": 1},
        "examples": ["train.jsonl:7: broken_json: Expecting ',' delimiter"],
    },
    "data.heldout": {
        "file": "demo/heldout.jsonl",
        "rows": 256,
        "used": 256,
        "rejected": {},
        "examples": [],
    },
}


def step_metrics(step: int, steps: int, noise: random.Random) -> dict[str, float]:
    """Metrics of a training step of a run that goes well."""
    kl = 0.05 + 0.55 * math.exp(-4 * step / steps)
    stages = {
        "perf/rollout_s": noise.uniform(0.5, 0.7),
        "perf/teacher_s": noise.uniform(0.25, 0.35),
        "perf/learner_s": noise.uniform(0.6, 0.8),
        "perf/publish_s": 0.03,
        "perf/sync_s": noise.uniform(0.08, 0.12),
        "perf/checkpoint_s": 0.35 if step % 20 == 0 else 0.0,
        "perf/other_s": noise.uniform(0.02, 0.04),
    }
    step_s = sum(stages.values())
    length = 17.6 + noise.gauss(0, 0.15)
    return {
        "train/loss": kl * noise.gauss(1, 0.15),
        "train/kl_reverse": kl * noise.gauss(1, 0.12),
        "train/kl_forward": 0.8 * kl * abs(noise.gauss(1, 0.35)),
        "train/cross_entropy": 0.1 + kl,
        "train/entropy": 0.11 + 0.28 * math.exp(-3 * step / steps) + noise.gauss(0, 0.006),
        "train/grad_norm": 1.4 + abs(noise.gauss(0, 0.4)),
        "train/lr": 1e-3,
        "train/advantage_mean": -kl * noise.gauss(1, 0.12),
        "train/advantage_abs_max": 6 + abs(noise.gauss(0, 1.5)),
        "train/tokens": round(128 * length),
        "train/skipped": 0,
        "train/log_ratio_at/0-15": kl * 1.1,
        "train/log_ratio_at/16-63": kl * 0.7,
        "train/support_student_mass": 0.97,
        "train/support_teacher_mass": 0.99,
        "train/support_overlap_frac": 0.9 - 0.3 * kl,
        "train/special_masked_frac": 0.0,
        "task/reward_mean": 0.4 + 0.5 * step / steps,
        "train/clipped_frac": 0.01,
        "teacher/share/weak": 1.0 - step / steps,
        "teacher/share/good": step / steps,
        "offpolicy/age_mean": 0.0,
        "offpolicy/age_max": 0,
        "offpolicy/logprob_diff_mean": 4e-7 * math.exp(noise.gauss(0, 0.2)),
        "offpolicy/logprob_diff_max": 8e-6 * math.exp(noise.gauss(0, 0.5)),
        "offpolicy/masked_frac": 0.0,
        "offpolicy/ppl_drift": 1 + noise.gauss(0, 2e-6),
        "rollout/len_mean": length,
        "rollout/truncated_frac": max(0.0, noise.gauss(0.006, 0.006)),
        "rollout/tokens_per_s": 128 * length / stages["perf/rollout_s"],
        "teacher/latency_p95_s": 0.2,
        "teacher/tokens_per_s": 128 * (length + 9) / stages["perf/teacher_s"],
        "teacher/error_frac": 0.0,
        **stages,
        "perf/step_s": step_s,
        "perf/outside_model_frac": 0.1,
        "perf/learner_tokens_per_s": 128 * length / stages["perf/learner_s"],
        "data/epoch": step * 32 // 7000,
        "data/prompts_issued": step * 32,
        "data/prompts_trained": step * 32,
        "data/prompts_rejected": 0,
        "data/prompts_in_flight": 0,
        "memory/peak_rss_gib": 6.2,
    }


def evaluation_metrics(step: int, steps: int) -> dict[str, float]:
    progress = 1 - math.exp(-4 * step / steps)
    return {
        "eval/heldout/accuracy": 0.35 + 0.56 * progress,
        "eval/heldout/best_of_n": 0.95 + 0.05 * progress,
        "eval/heldout/truncated_frac": 0.008 * (1 - progress),
        "eval/heldout/len_mean": 17.5,
        "eval/heldout/kl_reverse": 0.62 - 0.55 * progress,
        "eval/heldout/kl_forward": 0.51 - 0.44 * progress,
        "eval/heldout/teacher_accuracy": 0.966,
        "eval/heldout/kl_reverse_to/weak": 0.1 + 0.4 * progress,
        "eval/heldout/kl_reverse_to/good": 0.62 - 0.55 * progress,
        "eval/heldout/accuracy_as/weak": 0.35 + 0.2 * progress,
        "eval/heldout/accuracy_as/good": 0.35 + 0.56 * progress,
        "perf/eval_s": 2.1,
    }


def made_up_rollout(step: int, steps: int, number: int, noise: random.Random) -> ColoredRollout:
    """An addition with a mistake that is likely early and rare late."""
    a, b = noise.randint(10, 99), noise.randint(10, 99)
    ones, tens = (a % 10, b % 10), (a // 10, b // 10)
    response = f"{ones[0]}+{ones[1]}={sum(ones)},{tens[0]}+{tens[1]}={sum(tens)}>{a + b}"
    tokens, advantages, right = [], [], True
    for token in [*response, "<|im_end|>"]:
        advantage = noise.gauss(0.02, 0.08)
        if token.isdigit() and noise.random() < 0.12 * math.exp(-4 * step / steps):
            token, advantage, right = str((int(token) + 3) % 10), -noise.uniform(1, 7), False
        elif noise.random() < 0.25:
            advantage = noise.gauss(0.15, 0.35)
        tokens.append(token)
        advantages.append(advantage)
    return ColoredRollout(
        step=step,
        sample_id=f"add2-{number}#{number % 4}",
        prompt=f"{a}+{b}:",
        tokens=tuple(tokens),
        advantages=tuple(advantages),
        weights=tuple(0.0 if noise.random() < 0.01 else 1.0 for _ in tokens),
        correct=right,
        finish_reason="stop",
    )


def write_metrics(folder: Path, steps: int, last_step: int, restart_at: int | None) -> None:
    noise = random.Random(0)
    now = [START_S]
    path = folder / METRICS_JSONL
    writer = MetricsWriter(path, attempt=1, committed_step=-1, clock=lambda: now[0])
    writer.write(0, evaluation_metrics(0, steps))
    for step in range(1, last_step + 1):
        if step == restart_at:
            writer.close()
            writer = MetricsWriter(path, 2, committed_step=step - 1, clock=lambda: now[0])
            now[0] += 45
        row = step_metrics(step, steps, noise)
        if step % EVAL_EVERY == 0:
            row |= evaluation_metrics(step, steps)
        now[0] += row["perf/step_s"] + row.get("perf/eval_s", 0.0)
        writer.write(step, row)
    writer.close()


def write_run(
    folder: Path, steps: int = 80, last_step: int | None = None, restart_at: int | None = 41
) -> Path:
    """A run directory; with `last_step` below `steps` it died there and has no summary."""
    folder.mkdir(parents=True, exist_ok=True)
    last_step = steps if last_step is None else last_step
    write_metrics(folder, steps, last_step, restart_at)
    noise = random.Random(1)
    rollouts = JsonlWriter(folder / ROLLOUTS_JSONL, committed_step=-1)
    for number in range(0, last_step * 4):
        step = number // 4 + 1
        if step == 1 or step % EVAL_EVERY == 0:
            rollouts.append(made_up_rollout(step, steps, number, noise).to_record())
    rollouts.close()
    recipe = Recipe(
        name="demo",
        summary="Two-digit addition: a tiny student learns from a tiny teacher.",
        device="cpu",
        steps=steps,
        student=StudentConfig(path="demo/student"),
        teachers={"main": TeacherConfig(path="demo/teacher")},
        batch=BatchConfig(prompts_per_step=32, rollouts_per_prompt=4),
    )
    run = {"overrides": [f"steps={steps}"], "recipe": dataclasses.asdict(recipe)}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(describe_environment()))
    (folder / "inputs.json").write_text(json.dumps(INPUTS))
    if last_step == steps:
        (folder / "summary.json").write_text(json.dumps(summary(steps)))
    return folder


def summary(steps: int) -> dict[str, object]:
    before, after = evaluation_metrics(0, steps), evaluation_metrics(steps, steps)
    return {
        "accuracy_before": before["eval/heldout/accuracy"],
        "accuracy_after": after["eval/heldout/accuracy"],
        "teacher_accuracy": 0.966,
        "kl_before": before["eval/heldout/kl_reverse"],
        "kl_after": after["eval/heldout/kl_reverse"],
        "steps": steps,
        "wall_s": 213.4,
        "truncated_frac_before": 0.008,
        "truncated_frac_after": 0.0,
        "seed": 0,
        "ledger": {"issued": 2560, "trained": 2560, "rejected": {}, "in_flight": 0},
    }


if __name__ == "__main__":
    print(render_report(write_run(Path(sys.argv[1]))))
