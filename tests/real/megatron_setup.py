"""What the Megatron workers share: recipes and states of tiny students, one step, copies of weights and gradients."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_cases import OBJECTIVES, Case
from megatron_reference import CORRECTION, OPTIMIZER

from opd_megatron.config.schema import BatchConfig, LearnerConfig, Recipe, StudentConfig
from opd_megatron.exchange.batch_file import read_batch, read_index, read_whole
from opd_megatron.megatron import cpu_shim, hf, parallel
from opd_megatron.megatron.layout import Layout, layout_of
from opd_megatron.megatron.state import LearnerState, build_state
from opd_megatron.megatron.step import StepResult, entropy_of_rows, train

WORLD_TIMEOUT_S = 120.0
_layouts: list[Layout] = []  # those whose groups were built; the last one's are there


def recipe_for(
    model: Path, case: Case, objective: str = "sampled_token", precision: str = "fp32"
) -> Recipe:
    """A recipe for a tiny student; data parallel fills the world."""
    used = 1
    for key in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        used *= case.learner.get(key, 1)
    return Recipe(
        device="cpu",
        student=StudentConfig(path=str(model)),
        objective=OBJECTIVES[objective][0],
        optimizer=OPTIMIZER,
        correction=CORRECTION,
        batch=BatchConfig(tokens_per_microbatch=case.tokens_per_microbatch, padded=case.padded),
        learner=LearnerConfig(
            precision=precision, data_parallel=dist.get_world_size() // used, **case.learner
        ),
    )


def new_state(recipe: Recipe, case: Case | None = None) -> LearnerState:
    """Model of a layout, on new groups unless the previous case had the same layout."""
    layout = layout_of(recipe.learner)
    if _layouts[-1:] != [layout]:
        parallel.start_model_parallel(layout, recipe.seed, WORLD_TIMEOUT_S)
        _layouts.append(layout)
    state = build_state(recipe)
    if case is not None:
        state.layout = dataclasses.replace(layout, alignment=case.alignment)
    return state


def new_directory(path: Path) -> Path:
    """Made by rank 0, there on every rank."""
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    return path


def step_on(state: LearnerState, batch: Path) -> StepResult:
    """One training step on a batch file."""
    return train(
        state,
        read_index(batch),
        lambda samples: read_batch(batch, samples),
        read_whole(batch, entropy_of=entropy_of_rows),
    )


def gather_gradient_shards(state: LearnerState) -> None:
    """The distributed optimizer reduces each gradient to one rank's shard: make the buffers whole."""
    for model in state.models:
        for group in model.bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


def snapshot(state: LearnerState, value: str = "weight") -> dict[str, torch.Tensor]:
    """Copies of all weights or reduced gradients on rank 0 (a stream may alias live buffers)."""
    if value == "gradient" and state.recipe.learner.distributed_optimizer:
        gather_gradient_shards(state)
    streamed = hf.stream(state.modules, state.arch, state.groups, value)
    return {name: tensor.clone() for name, tensor in streamed}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest entry of the reference."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def run_worker(what: dict[str, Callable[[Path], dict[str, Any]]]) -> None:
    """Join the world, do what the command line names, write WORK/<name>.json for each on rank 0."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu_shim.install()
    # Every new layout collects the old one's groups: what was imported need not be searched each time.
    gc.collect()
    gc.freeze()
    work, names = Path(sys.argv[1]), sys.argv[2:]
    parallel.start_process_group("cpu", WORLD_TIMEOUT_S)
    for name in names:
        folder = new_directory(work / name) if len(names) > 1 else work
        results = what[name](folder)
        if dist.get_rank() == 0:
            (work / f"{name}.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()
