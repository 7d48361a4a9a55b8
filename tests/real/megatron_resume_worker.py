"""Runs under torchrun: 20 steps on recorded rollouts straight, and once more from every step between them.

    torchrun --nproc-per-node 2 megatron_resume_worker.py WORK_DIRECTORY LAYOUT

Rank 0 writes WORK_DIRECTORY/LAYOUT.json. Every other checkpoint is written in the background, while the next step
trains. Warm-up and decay of the learning rate fall into the 20 steps, so a schedule that starts over would show. The
model draws no numbers, so after every step each rank draws from all generators that a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
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


def draw() -> list[float]:
    """One number of each generator of this rank."""
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    with tracker.fork():
        tracked = float(torch.rand(()))
    return [random.random(), float(np.random.rand()), float(torch.rand(())), tracked]


def seed_apart() -> None:
    """Other random states on every rank, and others than those of a learner that has just started."""
    rank = dist.get_rank()
    random.seed(100 + rank)
    np.random.seed(200 + rank)
    torch.manual_seed(300 + rank)
    for _ in range(rank + 1):
        draw()


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
    seed_apart()
    metrics: list[dict[str, float]] = []
    drawn: list[list[float]] = []
    for step, batch in enumerate(batches, start=1):
        metrics.append(step_on(straight, batch).metrics)
        if straight.saving is not None:
            checkpoint.finish(straight, wait=True)
        if step < STEPS:
            save = checkpoint.begin if step % 2 else checkpoint.save
            save(straight, new_directory(work / f"step_{step}"))
        drawn.append(draw())
    wanted = snapshot(straight)
    results: dict[str, Any] = {}
    for split in range(1, STEPS):
        resumed = new_state(recipe)
        checkpoint.load(resumed, work / f"step_{split}")
        loaded = resumed.optimizer_step
        seen, drawn_again = [], [draw()]
        for batch in batches[split:]:
            seen.append(step_on(resumed, batch).metrics)
            drawn_again.append(draw())
        ranks_that_differ: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks_that_differ, drawn_again != drawn[split - 1 :])
        weights = snapshot(resumed)
        results[str(split)] = {
            "loaded": loaded,
            "ended": resumed.optimizer_step,
            "metrics_that_differ": sum(a != b for a, b in zip(seen, metrics[split:], strict=True)),
            "ranks_that_draw_differently": sum(ranks_that_differ),
            "tensors_that_differ": sum(not torch.equal(weights[n], wanted[n]) for n in wanted),
        }
    rates = [row["train/lr"] for row in metrics]
    numbers = [number for row in drawn for number in row]
    losses = [row["train/loss"] for row in metrics]
    return {"splits": results, "rates": rates, "losses": losses, "drawn": numbers}


if __name__ == "__main__":
    run_worker({name: functools.partial(splits, what) for name, what in RESUMED.items()})
