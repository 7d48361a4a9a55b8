"""One optimizer step over a step batch, and scoring without a step.

per micro-batch   forward -> token statistics (at the rollout temperature) -> loss SUM -> backward
once              reduce gradients, divide by the GLOBAL number of response tokens, global norm
decide            a NaN or infinity anywhere: no rank steps, everything stays bitwise as it was
else              clip, AdamW, schedule
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opd_megatron.errors import ContractError
from opd_megatron.exchange.batch_file import BatchIndex, BatchSlice
from opd_megatron.losses.diagnostics import finish
from opd_megatron.losses.token_loss import TokenInputs
from opd_megatron.losses.token_stats import TokenStats
from opd_megatron.megatron import hf
from opd_megatron.megatron.forward import (
    DeviceMicroBatch,
    MicroOutput,
    in_batch_order,
    pack_for_rank,
    run_micro_batches,
)
from opd_megatron.megatron.optimizer import apply_gradients, gradient_norm
from opd_megatron.megatron.reduction import GlobalReport, make_global, micro_report
from opd_megatron.megatron.state import LearnerState

ReadSamples = Callable[[Sequence[int]], BatchSlice]
SCORE_NAMES = ("student_logprobs", "student_entropy")
TRAIN_NAMES = (*SCORE_NAMES, "advantages", "weights")


@dataclass(frozen=True)
class StepResult:
    """Values are [sum L] in batch order."""

    why_not_applied: str | None
    metrics: dict[str, float]
    timings: dict[str, float]
    values: dict[str, torch.Tensor]


def check_staleness(index: BatchIndex, max_staleness: int) -> None:
    """Refuse samples that are too old, whatever the scheduler thought.

    Raises:
        ContractError: naming the oldest sample.
    """
    if not index.sample_ids:
        return
    ages = index.weight_version - index.versions[:, 0]
    oldest = int(ages.argmax())
    if ages[oldest] > max_staleness or index.versions.max() > index.weight_version:
        first, last = (int(v) for v in index.versions[oldest])
        raise ContractError(
            f"sample {index.sample_ids[oldest]}: made by weight versions {first}..{last}, the "
            f"batch is for version {index.weight_version} with max_staleness {max_staleness}"
        )


def _student_values(stats: TokenStats) -> dict[str, torch.Tensor]:
    return {"student_logprobs": stats.sampled_logprobs_T, "student_entropy": stats.entropy_T}


def score(
    state: LearnerState, index: BatchIndex, read: ReadSamples, temperature: float
) -> dict[str, torch.Tensor]:
    """Log-probs and entropies of all response tokens, [sum L] float32 each."""
    state.require_loaded()

    def keep_stats(stats: TokenStats, batch: DeviceMicroBatch) -> Any:
        zero = stats.log_z_T.new_zeros(())
        return zero, batch.mask_T.sum(), _student_values(stats), None

    outputs = _run(state, index, read, keep_stats, temperature, forward_only=True)
    return _values(state, outputs, SCORE_NAMES, index)


def train(state: LearnerState, index: BatchIndex, read: ReadSamples) -> StepResult:
    """One step; see the module docstring. All ranks return the same metrics and decision."""
    optimizer, scheduler = state.require_loaded(), state.scheduler
    assert scheduler is not None
    start = time.perf_counter()

    def loss(stats: TokenStats, batch: DeviceMicroBatch) -> Any:
        inputs = TokenInputs(batch.behavior_logprobs_T, batch.teacher_logprobs_T, batch.mask_T)
        output = state.token_loss(stats, inputs)
        values = _student_values(stats) | {
            "advantages": output.advantages_T,
            "weights": output.weights_T,
        }
        report = micro_report(stats, inputs, output, batch.output_index_T)
        return output.loss_sum, output.token_count, values, report

    state.model.zero_grad_buffer()
    optimizer.zero_grad()
    temperature = state.recipe.rollout.temperature
    outputs = _run(state, index, read, loss, temperature, forward_only=False)
    report = make_global(
        [output.extra for output in outputs], *_report_names(state), state.groups, state.device
    )
    forwarded = time.perf_counter()
    norm = gradient_norm(optimizer)
    why_not = _why_not(state, report, norm, index)
    learning_rate = float(optimizer.param_groups[0]["lr"])
    if why_not is None:
        apply_gradients(optimizer, norm)
        scheduler.step(1)
        state.optimizer_step += 1
    stepped = time.perf_counter()
    metrics = finish(report.sums, report.maxes) | {
        "train/grad_norm": norm,
        "train/lr": learning_rate,
        "train/tokens": report.sums["train/loss"][1],
    }
    values = _values(state, outputs, TRAIN_NAMES, index)
    return StepResult(
        why_not_applied=why_not,
        # A step that was refused for a NaN has NaN metrics, which JSON can not carry.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        timings={
            "forward_backward_s": forwarded - start,
            "optimizer_s": stepped - forwarded,
            "total_s": time.perf_counter() - start,
        },
        values=values,
    )


def _run(
    state: LearnerState,
    index: BatchIndex,
    read: ReadSamples,
    micro_loss: Any,
    temperature: float,
    forward_only: bool,
) -> list[MicroOutput]:
    micro_batches = pack_for_rank(
        index,
        read,
        state.layout,
        state.groups,
        state.recipe.batch.tokens_per_microbatch,
        state.arch.vocab_size,
    )
    return run_micro_batches(
        state.model,
        state.arch,
        state.groups,
        micro_batches,
        micro_loss,
        temperature=temperature,
        forward_only=forward_only,
    )


def _values(
    state: LearnerState, outputs: list[MicroOutput], names: Sequence[str], index: BatchIndex
) -> dict[str, torch.Tensor]:
    return in_batch_order(outputs, names, index.num_response_tokens, state.groups, state.device)


def _report_names(state: LearnerState) -> tuple[list[str], list[str]]:
    """Names of the loss's sums and maxima, from zero tokens: some stages never compute a loss."""
    nothing = torch.zeros(0)
    output = state.token_loss(
        TokenStats(nothing, nothing, nothing), TokenInputs(nothing, nothing, nothing)
    )
    return sorted({*output.sums, "train/loss"}), sorted(output.maxes)


def _first_bad_gradient(state: LearnerState) -> str | None:
    """Hugging Face names in this rank's first parameter with a NaN or infinite gradient."""
    for unit, parameter in hf.local_parameters(state.module, state.arch):
        if not bool(torch.isfinite(getattr(parameter, "main_grad")).all()):  # noqa: B009
            return " + ".join(unit.hf)
    return None


def _why_not(
    state: LearnerState, report: GlobalReport, norm: float, index: BatchIndex
) -> str | None:
    """The reason not to apply the step, the same on all ranks, or None."""
    if report.trouble is not None:
        kind, row = report.trouble
        sample = int(np.searchsorted(index.response_offsets, row, side="right")) - 1
        position = row - int(index.response_offsets[sample])
        return f"{kind} is not finite: sample {index.sample_ids[sample]}, response token {position}"
    if report.sums["train/loss"][1] == 0:
        return "the batch has no response token"
    if math.isfinite(norm):
        return None
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, _first_bad_gradient(state))
    culprits = [f"{name} on rank {rank}" for rank, name in enumerate(names) if name]
    return (
        f"the gradient is not finite (norm {norm}): {', '.join(culprits) or 'overflow of the norm'}"
    )
