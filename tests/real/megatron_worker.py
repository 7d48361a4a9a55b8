"""Runs under torchrun: many layouts in one launch.

    torchrun --nproc-per-node 2 megatron_worker.py WORK_DIRECTORY [layouts] [moves] [broken]

Rank 0 holds the reference and writes WORK_DIRECTORY/<what>.json: per case the differences, judged by the tests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_cases import BROKEN, CASES, LENGTHS, MOVES, OBJECTIVES, ROUND_TRIPS, VOCAB, Case
from megatron_reference import TOKEN_LOSSES, Reference, reference_run
from megatron_setup import (
    new_directory,
    new_state,
    recipe_for,
    relative,
    run_worker,
    snapshot,
    step_on,
)
from megatron_tiny import write_model, write_samples

from opd_megatron.exchange.batch_file import read_batch, read_index
from opd_megatron.megatron import checkpoint, hf
from opd_megatron.megatron.forward import to_device
from opd_megatron.megatron.state import LearnerState
from opd_megatron.megatron.step import StepResult, packed_batch
from opd_megatron.types import Sample

# ---------------------------------------------------------------- layouts


Student = tuple[str, bool]
QWEN3, QWEN3_TIED = ("qwen3", False), ("qwen3", True)


@dataclass(frozen=True)
class Inputs:
    """Batch files and (on rank 0) their samples by objective; models by family and whether embeddings are tied."""

    batches: dict[str, list[Path]]
    samples: dict[str, list[list[Sample]]]
    models: dict[Student, Path]


def student_of(case: Case) -> Student:
    return case.family, case.tied


def write_inputs(work: Path, students: Iterable[Student]) -> Inputs:
    """Write all of them on rank 0."""
    batches = {
        name: [work / f"{name}{i}.safetensors" for i in range(len(LENGTHS))] for name in OBJECTIVES
    }
    models = {
        (family, tied): work / f"{family}{'_tied' if tied else ''}"
        for family, tied in sorted(set(students))
    }
    samples: dict[str, list[list[Sample]]] = {}
    if dist.get_rank() == 0:
        for name, (_, topk) in OBJECTIVES.items():
            samples[name] = [
                write_samples(path, lengths, VOCAB, seed=i, topk=topk)
                for i, (path, lengths) in enumerate(zip(batches[name], LENGTHS, strict=True))
            ]
        for (family, tied), path in models.items():
            write_model(path, family, tied, vocab_size=VOCAB)
    dist.barrier()
    return Inputs(batches, samples, models)


def loads(state: LearnerState, batches: list[Path]) -> dict[str, list[int]]:
    """Of each batch: micro-batches of a rank, and how many tokens count on the rank that has least."""
    micro_batches, least = [], []
    for path in batches:
        packed = packed_batch(state, read_index(path), functools.partial(read_batch, path))
        mine = [to_device(micro, state.groups, state.device).output_index_T for micro in packed]
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, sum(int((index_T >= 0).sum()) for index_T in mine))
        micro_batches.append(len(packed))
        least.append(min(counts))
    return {"micro_batches": micro_batches, "least_tokens": least}


def layout_case(
    model_path: Path, batches: list[Path], reference: Reference | None, case: Case, objective: str
) -> dict[str, Any] | None:
    """Two steps in one layout against the reference."""
    state = new_state(recipe_for(model_path, case, objective), case)
    state.load_hf(model_path)
    load = loads(state, batches)
    steps, gradients = [], []
    for batch in batches:
        steps.append(step_on(state, batch))
        gradients.append(snapshot(state, "gradient"))
    weights = snapshot(state)
    if reference is None:
        return None
    return {
        "loss": max(
            abs(s.metrics["train/loss"] / loss - 1)
            for s, loss in zip(steps, reference.losses, strict=True)
        ),
        "norm": max(
            abs(s.metrics["train/grad_norm"] / norm - 1)
            for s, norm in zip(steps, reference.norms, strict=True)
        ),
        "logprobs": float(
            (steps[0].values["student_logprobs"] - reference.student_logprobs).abs().max()
        ),
        "gradient": max(
            relative(mine[n], theirs[n])
            for mine, theirs in zip(gradients, reference.clipped_gradients, strict=True)
            for n in theirs
        ),
        "weights": max(
            float((weights[n] - reference.weights[n]).abs().max()) for n in reference.weights
        ),
        "masked_frac": steps[0].metrics["offpolicy/masked_frac"],
        "applied": float(all(s.why_not_applied is None for s in steps)),
        **load,
    }


def layouts(work: Path) -> dict[str, Any]:
    cases = CASES[dist.get_world_size()]
    inputs = write_inputs(work, map(student_of, cases.values()))
    references = {
        (student, objective): reference_run(
            path, inputs.samples[objective], TOKEN_LOSSES[objective]
        )
        for student, path in inputs.models.items()
        for objective in OBJECTIVES
        if dist.get_rank() == 0
    }
    return {
        f"{objective}-{name}": layout_case(
            inputs.models[student_of(case)],
            inputs.batches[objective],
            references.get((student_of(case), objective)),
            case,
            objective,
        )
        for name, case in cases.items()
        for objective in OBJECTIVES
    }


# ---------------------------------------------------------------- moves and broken gradients


def move_case(
    model_path: Path, batches: list[Path], work: Path, path: list[Case], precision: str
) -> dict[str, float] | None:
    """Step, save, load (and save again) in other layouts, step: weights against the uninterrupted run."""
    straight = state = new_state(recipe_for(model_path, path[0], precision=precision))
    straight.load_hf(model_path)
    step_on(straight, batches[0])
    commits = [work.with_name(f"{work.name}-{i}") for i in range(len(path))]
    checkpoint.save(straight, new_directory(commits[0]))
    step_on(straight, batches[1])
    wanted = snapshot(straight)
    for i, case in enumerate(path[1:], start=1):
        state = new_state(recipe_for(model_path, case, precision=precision))
        checkpoint.load(state, commits[i - 1])
        if i + 1 < len(path):
            checkpoint.save(state, new_directory(commits[i]))
    steps_loaded = state.optimizer_step
    step_on(state, batches[1])
    weights = snapshot(state)
    if dist.get_rank() != 0:
        return None
    return {
        "steps_loaded": float(steps_loaded),
        "weights": max(float((weights[n] - wanted[n]).abs().max()) for n in wanted),
    }


def moves(work: Path) -> dict[str, Any]:
    inputs = write_inputs(work, [QWEN3_TIED])
    model, batches = inputs.models[QWEN3_TIED], inputs.batches["sampled_token"]
    results: dict[str, Any] = {}
    for name, (saved, loaded) in MOVES.items():
        for precision in ("fp32", "bf16") if saved == loaded else ("fp32",):
            key = f"{precision}-{name}"
            results[key] = move_case(model, batches, work / key, [saved, loaded], precision)
    for name, (first, other) in ROUND_TRIPS.items():
        precision = name.split("-")[0]
        results[name] = move_case(model, batches, work / name, [first, other, first], precision)
    return results


def bf16_case(model_path: Path, batch: Path, case: Case) -> dict[str, Any] | None:
    """A step in bf16 against one in fp32 of the same layout, and the format of what comes out."""
    steps: dict[str, StepResult] = {}
    dtypes: set[str] = set()
    for precision in ("fp32", "bf16"):
        state = new_state(recipe_for(model_path, case, precision=precision))
        state.load_hf(model_path)
        steps[precision] = step_on(state, batch)
        dtypes = {str(tensor.dtype) for tensor in snapshot(state).values()}
    if dist.get_rank() != 0:
        return None
    low, high = steps["bf16"], steps["fp32"]
    return {
        "logprobs_mean": float(
            (low.values["student_logprobs"] - high.values["student_logprobs"]).abs().mean()
        ),
        "norm": abs(low.metrics["train/grad_norm"] / high.metrics["train/grad_norm"] - 1),
        "applied": low.why_not_applied is None,
        "dtypes": sorted(dtypes),
        "parameters": str(next(state.modules[0].parameters()).dtype),
        "gradients": str(getattr(next(state.modules[0].parameters()), "main_grad").dtype),  # noqa: B009
    }


def everything(state: LearnerState) -> list[torch.Tensor]:
    """Copies of all that a step changes on this rank: parameters, master weights, moments."""
    optimizer = state.require_loaded()
    tensors = [parameter.data for module in state.modules for parameter in module.parameters()]
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [parameter.data, *part.optimizer.state[parameter].values()]
    return [tensor.clone() for tensor in tensors]


def broken_gradient_case(
    model_path: Path, batch: Path, case: Case, precision: str, factor: float
) -> dict[str, Any] | None:
    """One gradient of the last rank only is not finite: does any bit of any rank change?"""
    state = new_state(recipe_for(model_path, case, precision=precision))
    state.load_hf(model_path)
    before = everything(state)
    unit, parameter = hf.local_parameters(state.modules, state.arch)[3]
    is_broken = dist.get_rank() == dist.get_world_size() - 1
    fault = parameter.register_hook(lambda grad: grad * factor) if is_broken else None
    refused = step_on(state, batch)
    changed = _num_changed(before, everything(state))
    if fault is not None:
        fault.remove()
    healthy = step_on(state, batch)
    changed_by_healthy = _num_changed(before, everything(state))
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (unit.hf, changed, changed_by_healthy, refused.why_not_applied))
    if dist.get_rank() != 0:
        return None
    return {
        "why_not_applied": refused.why_not_applied,
        "reasons": len({why for *_, why in seen}),
        "parameter": " + ".join(seen[-1][0]),
        "changed": sum(count for _, count, _, _ in seen),
        "changed_by_healthy": min(count for _, _, count, _ in seen),
        "healthy_why_not": healthy.why_not_applied,
        "steps": state.optimizer_step,
    }


def _num_changed(before: list[torch.Tensor], after: list[torch.Tensor]) -> int:
    return sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def broken(work: Path) -> dict[str, Any]:
    inputs = write_inputs(work, [QWEN3])
    model, batch = inputs.models[QWEN3], inputs.batches["sampled_token"][0]
    return {
        name: {
            "nan": broken_gradient_case(model, batch, case, "fp32", math.nan),
            "inf": broken_gradient_case(model, batch, case, "bf16", math.inf),
            "bf16": bf16_case(model, batch, case),
        }
        for name, case in BROKEN.items()
    }


if __name__ == "__main__":
    run_worker({"layouts": layouts, "moves": moves, "broken": broken})
