"""What the controller writes for people: metric rows, ledger lines, coloured rollouts, the summary, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from opd_megatron.atomic import write_json
from opd_megatron.config.schema import Recipe
from opd_megatron.controller.alarms import is_repetitive
from opd_megatron.controller.ledger import Ledger
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.data.prompts import PromptSet
from opd_megatron.eval.grading import Grader
from opd_megatron.observe.coloring import ColoredRollout
from opd_megatron.observe.jsonl import JsonlWriter, read_rows
from opd_megatron.observe.writer import MetricsWriter
from opd_megatron.rundir import RunDir
from opd_megatron.types import Prompt, Sample

_EVAL = "eval/heldout/"


class Records:
    """The three append-only files of a run; steps after the commit that is gone on from are cut off first."""

    def __init__(self, run: RunDir, attempt: int, committed_step: int) -> None:
        self.metrics = MetricsWriter(run.metrics, attempt, committed_step)
        self.ledger = JsonlWriter(run.ledger, committed_step)
        self.rollouts = JsonlWriter(run.rollouts, committed_step)
        self._attempt = attempt

    def step(
        self, step: int, values: Mapping[str, float], prompts: Sequence[tuple[int, Prompt]]
    ) -> dict[str, Any]:
        """Write the row of a step and which prompt positions it trained; returns the row."""
        if prompts:
            self.ledger.append(
                {
                    "step": step,
                    "attempt": self._attempt,
                    "positions": [position for position, _ in prompts],
                    "prompt_ids": [prompt.id for _, prompt in prompts],
                }
            )
        return self.metrics.write(step, values)

    def close(self) -> None:
        self.metrics.close()
        self.ledger.close()
        self.rollouts.close()


def length_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """rollout/* of a step."""
    lengths = [int(sample.rollout.sampled.sum()) for sample in samples]
    metrics = {
        "rollout/len_mean": float(np.mean(lengths)),
        "rollout/truncated_frac": float(np.mean([s.rollout.truncated for s in samples])),
        "rollout/repetitive_frac": float(
            np.mean([is_repetitive(s.rollout.response_ids) for s in samples])
        ),
    }
    rewards = [s.rollout.reward for s in samples if s.rollout.reward is not None]
    if rewards:
        metrics["rollout/turns_mean"] = float(np.mean([1 + len(s.rollout.given) for s in samples]))
        metrics["rollout/environment_reward_mean"] = float(np.mean(rewards))
    return metrics


def age_metrics(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """offpolicy/*age_* of a step that trained `version`, and how many samples more than one version wrote."""
    ages = [version - sample.rollout.version_first for sample in samples]
    versions = np.concatenate([sample.rollout.token_versions for sample in samples])
    token_ages = version - versions[versions >= 0]
    return {
        "offpolicy/age_mean": float(np.mean(ages)),
        "offpolicy/age_max": float(max(ages)),
        "offpolicy/token_age_mean": float(np.mean(token_ages)),
        "offpolicy/mixed_frac": float(np.mean([bool(s.rollout.spans) for s in samples])),
    }


def speed_metrics(
    samples: Sequence[Sample], perf: Mapping[str, float], busy: Mapping[str, float]
) -> dict[str, float]:
    """Tokens per second of the three model stages; absent where a stage took no time of its own.

    Args:
        perf: perf/* of the step.
        busy: seconds in which each stage was at work.
    """
    generated = sum(int(s.rollout.sampled.sum()) for s in samples)
    scored = sum(len(s.rollout.prompt_ids) + len(s.rollout.response_ids) for s in samples)
    pairs = {
        "rollout/tokens_per_s": (generated, busy["rollout"]),
        "teacher/tokens_per_s": (scored, perf["perf/teacher_s"]),
        "perf/learner_tokens_per_s": (generated, perf["perf/learner_s"]),
    }
    return {name: tokens / seconds for name, (tokens, seconds) in pairs.items() if seconds > 0}


def ledger_metrics(ledger: Ledger, epoch: int) -> dict[str, float]:
    """data/* at a step boundary."""
    return {
        "data/epoch": epoch,
        "data/prompts_issued": ledger.issued,
        "data/prompts_trained": ledger.trained,
        "data/prompts_rejected": sum(ledger.rejected.values()),
        "data/prompts_in_flight": len(ledger.in_flight),
    }


def memory_in_use_gib() -> float:
    """Resident memory of every process of this attempt, pages shared between them counted once (PSS)."""
    supervisor = psutil.Process().parent()
    family = [psutil.Process()] if supervisor is None else supervisor.children(recursive=True)
    total = 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**30


def colored_rollout(
    step: int,
    index: int,
    samples: Sequence[Sample],
    prompt: Prompt,
    advantages: NDArray[np.float32],
    weights: NDArray[np.float32],
    tokenizer: ChatTokenizer,
    grader: Grader | None,
) -> ColoredRollout:
    """Sample `index` of a step batch with the learner's per-token diagnostics (flat, in batch order)."""
    begin = sum(len(s.rollout.response_ids) for s in samples[:index])
    rollout = samples[index].rollout
    cut = slice(begin, begin + len(rollout.response_ids))
    correct = None
    if rollout.reward is not None:
        # A conversation's environment judged its last turn; a grader would read all of it as one answer.
        correct = rollout.reward == 1.0
    elif grader is not None and prompt.answer is not None:
        text = tokenizer.decode_response(rollout.response_ids)
        correct = grader(prompt.text, text, prompt.answer, not rollout.truncated)
    return ColoredRollout(
        step=step,
        sample_id=rollout.sample_id,
        prompt=prompt.text,
        tokens=tuple(tokenizer.decode_token(i) for i in rollout.response_ids),
        advantages=tuple(float(a) for a in advantages[cut]),
        weights=tuple(float(w) for w in weights[cut]),
        correct=correct,
        finish_reason=rollout.finish_reason,
    )


def run_seconds(rows: Sequence[Mapping[str, Any]], attempt: int, attempt_s: float) -> float:
    """Wall seconds of the run: this attempt from its start, earlier ones between their first and last row."""
    earlier: dict[int, list[float]] = {}
    for row in rows:
        if row["attempt"] != attempt:
            earlier.setdefault(row["attempt"], []).append(row["time_s"])
    return attempt_s + sum(max(times) - min(times) for times in earlier.values())


def account_for_inputs(train: PromptSet, heldout: PromptSet | None) -> dict[str, Any]:
    """Content of inputs.json: of each prompt file, the rows that are used and the refused ones by reason."""
    files = {"data.train": train} | ({} if heldout is None else {"data.heldout": heldout})
    return {
        key: {
            "file": str(prompts.path),
            "rows": len(prompts) + sum(prompts.rejected.values()),
            "used": len(prompts),
            "rejected": prompts.rejected,
            "examples": list(prompts.rejected_examples),
        }
        for key, prompts in files.items()
    }


def input_lines(inputs: Mapping[str, Any]) -> list[str]:
    """The same for the console, one line a file."""
    lines = []
    for key, account in inputs.items():
        rejected = ", ".join(f"{reason} {count}" for reason, count in account["rejected"].items())
        lines.append(
            f"{key}: {account['used']} of {account['rows']} rows used"
            + (f"; rejected: {rejected} (see inputs.json)" if rejected else "")
        )
    return lines


def summarize(
    recipe: Recipe, run: RunDir, ledger: Ledger, attempt: int, attempt_s: float
) -> dict[str, Any]:
    """Content of summary.json. A figure that was not measured is null."""
    rows = read_rows(run.metrics)
    evaluated = [row for row in rows if f"{_EVAL}accuracy" in row]
    first, last = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
    peaks = [row["memory/peak_rss_gib"] for row in rows if "memory/peak_rss_gib" in row]
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "wall_s": round(run_seconds(rows, attempt, attempt_s), 1),
        "accuracy_before": first.get(f"{_EVAL}accuracy"),
        "accuracy_after": last.get(f"{_EVAL}accuracy"),
        "teacher_accuracy": first.get(f"{_EVAL}teacher_accuracy"),
        "kl_before": first.get(f"{_EVAL}kl_reverse"),
        "kl_after": last.get(f"{_EVAL}kl_reverse"),
        "truncated_frac_before": first.get(f"{_EVAL}truncated_frac"),
        "truncated_frac_after": last.get(f"{_EVAL}truncated_frac"),
        "attempts": attempt,
        "peak_memory_gib": max(peaks) if peaks else None,
        "ledger": {
            "issued": ledger.issued,
            "trained": ledger.trained,
            "rejected": dict(ledger.rejected),
            "in_flight": len(ledger.in_flight),
        },
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    write_json(path, dict(summary))
