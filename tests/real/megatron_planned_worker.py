"""Runs under torchrun: objectives that couple tokens, in layouts that cut the batch in different ways.

    torchrun --nproc-per-node 2 megatron_planned_worker.py WORK_DIRECTORY planned

Rank 0 writes WORK_DIRECTORY/planned.json: per objective and layout the differences from the first layout.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron_cases import LENGTHS, TOPK, VOCAB, Case
from megatron_setup import new_state, recipe_for, relative, run_worker, snapshot, step_on
from megatron_tiny import make_samples, write_model

from opd_megatron.config.schema import (
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    Recipe,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.types import Sample

# Sections of the recipe; each couples tokens of different responses, micro-batches and ranks.
PLANNED: dict[str, dict[str, Any]] = {
    "entropy filter, sequence mean": {
        "objective": ObjectiveConfig(normalization="sequence_mean", allow_biased=True),
        "filter": FilterConfig(score="student_entropy", low=30, high=90),
    },
    "teacher entropy filter on a support": {
        "objective": ObjectiveConfig(estimator="support_matching", topk=TOPK),
        "filter": FilterConfig(score="teacher_entropy", low=50),
    },
    "discount, sequence ratios": {
        "objective": ObjectiveConfig(divergence="squared_hellinger", discount=0.9),
        "correction": CorrectionConfig(kind="truncated", level="sequence", low=0.5, high=2.0),
    },
    "task in groups, two clipped updates": {
        "objective": ObjectiveConfig(coefficient=0.3, entropy_bonus=0.01, clip_low=0.001),
        "task": TaskConfig(coefficient=1.0),
        "correction": CorrectionConfig(kind="truncated", level="sequence", low=0.5, high=2.0),
        "whitening": WhiteningConfig(scope="group"),
        "updates_per_step": 2,
    },
    "whitened sum, geometric mean, kl filter": {
        "objective": ObjectiveConfig(allow_biased=True),
        "task": TaskConfig(coefficient=1.0),
        "whitening": WhiteningConfig(scope="batch", of="sum"),
        "correction": CorrectionConfig(level="geometric_mean", low=0.7, high=1.5),
        "filter": FilterConfig(score="kl", low=10, high=95),
    },
}
LAYOUTS = {
    "one micro-batch": Case({}, tokens_per_microbatch=256),
    "many micro-batches": Case({}),
    "tensor and sequence parallel": Case({"tensor_parallel": 2, "sequence_parallel": True}),
    "context parallel": Case({"context_parallel": 2}),
    "pipeline, chunked loss": Case({"pipeline_parallel": 2, "loss_mode": "chunked"}),
}


def graded_samples() -> list[Sample]:
    """Three responses a prompt, every third token of one masked, rewards of 0 and 1."""
    samples = []
    for i, sample in enumerate(make_samples(LENGTHS[0], VOCAB, seed=3, topk=TOPK)):
        length = len(sample.rollout.response_ids)
        samples.append(
            dataclasses.replace(
                sample,
                rollout=dataclasses.replace(sample.rollout, sample_id=f"p{i // 3}@0#{i % 3}"),
                trainable=np.arange(length) % 3 > 0 if i == 2 else np.ones(length, dtype=np.bool_),
                reward=float(i % 2),
            )
        )
    return samples


def recipe_of(model: Path, case: Case, sections: dict[str, Any]) -> Recipe:
    recipe = recipe_for(model, case)
    sections = dict(sections)
    batch = dataclasses.replace(recipe.batch, updates_per_step=sections.pop("updates_per_step", 1))
    return dataclasses.replace(recipe, batch=batch, **sections)


def step_in(model: Path, batch: Path, case: Case, sections: dict[str, Any]) -> dict[str, Any]:
    state = new_state(recipe_of(model, case, sections), case)
    state.load_hf(model)
    result = step_on(state, batch)
    return {
        "result": result,
        "weights": snapshot(state),
        "gradient": snapshot(state, "gradient"),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What the two layouts disagree on."""
    metrics, theirs = other["result"].metrics, one["result"].metrics
    values, wanted = other["result"].values, one["result"].values
    return {
        "updates": other["result"].updates,
        "why_not_applied": other["result"].why_not_applied,
        "tokens": [theirs["train/tokens"], metrics["train/tokens"]],
        "metrics": {
            name: [theirs.get(name), metrics.get(name)]
            for name in sorted({*theirs, *metrics})
            if not np.isclose(theirs.get(name, np.nan), metrics.get(name, np.nan), 1e-4, 1e-5)
        },
        "kept_differently": int(((values["losses"] != 0) != (wanted["losses"] != 0)).sum()),
        "values": {
            n: float((values[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp_min(1.0))
            for n in wanted
        },
        "gradient": max(
            relative(other["gradient"][n], one["gradient"][n]) for n in one["gradient"]
        ),
        "weights": max(
            float((other["weights"][n] - one["weights"][n]).abs().max()) for n in one["weights"]
        ),
    }


def broken_student(model: Path, batch: Path) -> dict[str, Any]:
    """A step of a student with a NaN in the embedding of rank 1 only, under a filter on its own entropy."""
    case = Case({"tensor_parallel": 2})
    state = new_state(recipe_of(model, case, PLANNED["entropy filter, sequence mean"]), case)
    state.load_hf(model)
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(p for p in state.modules[0].parameters() if p.dim() == 2).fill_(torch.nan)
    before = snapshot(state)
    result = step_on(state, batch)
    after = snapshot(state)
    return {
        "updates": result.updates,
        "why_not_applied": result.why_not_applied,
        "unchanged": all(
            torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before
        ),
    }


def planned(work: Path) -> dict[str, Any]:
    model, batch = work / "model", work / "batch.safetensors"
    if dist.get_rank() == 0:
        write_model(model, tied=False, vocab_size=VOCAB)
        write_batch(batch, 1, 0, graded_samples())
    dist.barrier()
    results: dict[str, Any] = {}
    for name, sections in PLANNED.items():
        first: dict[str, Any] = {}
        for layout, case in LAYOUTS.items():
            made = step_in(model, batch, case, sections)
            first = first or made
            if dist.get_rank() == 0:
                results[f"{name}-{layout}"] = difference(first, made)
    results["broken student"] = broken_student(model, batch)
    return results


if __name__ == "__main__":
    torch.manual_seed(0)
    run_worker({"planned": planned})
