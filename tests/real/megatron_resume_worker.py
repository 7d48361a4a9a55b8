"""Runs under torchrun: 20 steps on recorded rollouts straight, and once more from every step between them.

    torchrun --nproc-per-node 2 megatron_resume_worker.py WORK_DIRECTORY LAYOUT

Rank 0 writes WORK_DIRECTORY/LAYOUT.json. Every other checkpoint is written in the background, while the next step
trains. Warm-up and decay of the learning rate fall into the 20 steps, so a schedule that starts over would show.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_cases import RESUMED, STEPS, Resumed
from megatron_reference import OPTIMIZER
from megatron_setup import new_directory, new_state, recipe_for, run_worker, snapshot, step_on
from megatron_tiny import write_model, write_samples

from opd_megatron.config.schema import Recipe
from opd_megatron.megatron import checkpoint

SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 67,
}
LENGTHS = [(3, 9), (2, 5), (1, 14), (4, 2)]
SCHEDULE: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 4, "min_lr": 1e-4}


def prepare(work: Path, what: Resumed) -> tuple[Recipe, Path, list[Path]]:
    """Recipe, model and recorded batches; rank 0 writes them."""
    model = work / "student"
    batches = [work / f"batch{i}.safetensors" for i in range(STEPS)]
    if dist.get_rank() == 0:
        write_model(model, tied=True, **SMALL)
        for i, path in enumerate(batches):
            write_samples(path, LENGTHS, SMALL["vocab_size"], seed=i)
    dist.barrier()
    recipe = recipe_for(model, what.case, precision=what.precision)
    optimizer = dataclasses.replace(OPTIMIZER, **SCHEDULE)
    return dataclasses.replace(recipe, steps=STEPS, optimizer=optimizer), model, batches


def splits(what: Resumed, work: Path) -> dict[str, Any]:
    recipe, model, batches = prepare(work, what)
    straight = new_state(recipe)
    straight.load_hf(model)
    metrics: list[dict[str, float]] = []
    for step, batch in enumerate(batches, start=1):
        metrics.append(step_on(straight, batch).metrics)
        if straight.saving is not None:
            checkpoint.finish(straight, wait=True)
        if step < STEPS:
            save = checkpoint.begin if step % 2 else checkpoint.save
            save(straight, new_directory(work / f"step_{step}"))
    wanted = snapshot(straight)
    results: dict[str, Any] = {}
    for split in range(1, STEPS):
        resumed = new_state(recipe)
        checkpoint.load(resumed, work / f"step_{split}")
        loaded = resumed.optimizer_step
        seen = [step_on(resumed, batch).metrics for batch in batches[split:]]
        weights = snapshot(resumed)
        results[str(split)] = {
            "loaded": loaded,
            "ended": resumed.optimizer_step,
            "metrics_that_differ": sum(a != b for a, b in zip(seen, metrics[split:], strict=True)),
            "tensors_that_differ": sum(not torch.equal(weights[n], wanted[n]) for n in wanted),
        }
    rates = [row["train/lr"] for row in metrics]
    return {"splits": results, "rates": rates, "losses": [row["train/loss"] for row in metrics]}


if __name__ == "__main__":
    run_worker({name: functools.partial(splits, what) for name, what in RESUMED.items()})
