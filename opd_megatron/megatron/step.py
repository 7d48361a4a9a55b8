"""One step over a step batch, and scoring without a step.

once              look at what was recorded; score with the teachers inside the learner
                  (teacher_pass.py); plan the batch (losses/batch_plan.py), from a forward pass of its
                  own where the objective couples tokens
per update
  micro-batches   forward -> token statistics (at the rollout temperature) -> loss SUM -> backward
  once            reduce gradients, divide by the GLOBAL number of kept tokens, global norm
  decide          a NaN or infinity anywhere: no rank steps, everything stays bitwise as it was
  else            clip, AdamW
once              learning-rate schedule, metrics from the per-token values of the whole batch
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from opd_megatron.data.packing import MicroBatch
from opd_megatron.exchange.batch_file import BatchIndex, BatchSlice, WholeBatch
from opd_megatron.losses.batch_metrics import step_metrics
from opd_megatron.losses.batch_plan import BatchArrays, StudentScores, TokenPlan, make_plan
from opd_megatron.losses.served_supports import topk_entropy
from opd_megatron.losses.settings import LossSettings
from opd_megatron.megatron import hf
from opd_megatron.megatron.forward import (
    in_batch_order,
    pack_for_rank,
    run_micro_batches,
)
from opd_megatron.megatron.micro_loss import SCORE_NAMES, MicroLoss, MicroScore, value_names
from opd_megatron.megatron.model import gather_parameters
from opd_megatron.megatron.optimizer import apply_gradients, gradient_norm
from opd_megatron.megatron.state import LearnerState
from opd_megatron.megatron.teacher_pass import KeptTeachers, score_in_process

ReadSamples = Callable[[Sequence[int]], BatchSlice]
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """`updates`: optimizer updates that were applied. `values` are [sum L] in batch order."""

    updates: int
    why_not_applied: str | None
    metrics: dict[str, float]
    timings: dict[str, float]
    values: Values


def batch_arrays(whole: WholeBatch) -> BatchArrays:
    """The recorded arrays as tensors on the CPU."""
    lengths = np.diff(whole.response_offsets)
    entropy = whole.teacher_entropy
    return BatchArrays(
        behavior_logprobs_N=torch.from_numpy(whole.behavior_logprobs),
        teacher_logprobs_N=torch.from_numpy(whole.teacher_logprobs),
        trainable_N=torch.from_numpy(whole.trainable).bool(),
        sampled_N=torch.from_numpy(whole.token_versions >= 0),
        response_ids_N=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        groups_B=torch.from_numpy(whole.groups).long(),
        rewards_B=None if whole.rewards is None else torch.from_numpy(whole.rewards),
        teacher_entropy_N=None if entropy is None else torch.from_numpy(entropy),
        kept_logmass_N=None if whole.kept_logmass is None else torch.from_numpy(whole.kept_logmass),
    )


def entropy_of_rows(topk_logprobs_NK: NDArray[np.float32]) -> NDArray[np.float32]:
    """`topk_entropy`, as `exchange.batch_file.read_whole` wants it. [N]."""
    return topk_entropy(torch.from_numpy(topk_logprobs_NK)).numpy()


def score(state: LearnerState, index: BatchIndex, read: ReadSamples, temperature: float) -> Values:
    """Log-probs and entropies of all response tokens, [sum L] float32 each."""
    state.require_weights()
    return _score(state, index, packed_batch(state, index, read), temperature)


def _score(
    state: LearnerState, index: BatchIndex, micro_batches: Sequence[MicroBatch], temperature: float
) -> Values:
    outputs = run_micro_batches(
        state.models,
        state.groups,
        micro_batches,
        MicroScore(state.head, temperature),
        forward_only=True,
        mark=state.mark,
    )
    return in_batch_order(
        outputs, SCORE_NAMES, index.num_response_tokens, state.groups, state.device
    )


def train(
    state: LearnerState, index: BatchIndex, read: ReadSamples, whole: WholeBatch
) -> StepResult:
    """One step; see the module docstring. All ranks return the same metrics and decision.

    `timings` has `teacher_s` where a teacher inside the learner scored.
    """
    state.require_loaded()
    settings, arrays = LossSettings.of(state.recipe), batch_arrays(whole)
    start = time.perf_counter()
    bad = _first_bad({"behavior log-prob": arrays.behavior_logprobs_N}, index)
    if bad is not None:
        return _not_applied(bad)
    micro_batches = packed_batch(state, index, read)
    teachers = score_in_process(
        state,
        index,
        micro_batches,
        keep_hidden=settings.has_support,
        temperatures={name: t.temperature for name, t in state.recipe.teachers.items()},
    )
    if teachers is not None:
        arrays = teachers.into(arrays)
    bad = _first_bad(
        # A teacher may call a token impossible (-inf): the loss bounds the log-ratio.
        {"teacher log-prob": arrays.teacher_logprobs_N.clamp_min(-1e30)}
        | ({} if arrays.teacher_entropy_N is None else {"teacher top-K": arrays.teacher_entropy_N}),
        index,
    )
    if bad is not None:
        return _not_applied(bad)
    scores = None
    if settings.needs_scores:
        values = _score(state, index, micro_batches, state.recipe.rollout.temperature)
        bad = _first_bad(values, index)
        if bad is not None:
            return _not_applied(bad)
        scores = StudentScores(values["student_logprobs"], values["student_entropy"])
    plan = make_plan(settings, arrays, scores)
    if plan.num_kept == 0:
        return _not_applied("the batch has no token to train on")
    function = MicroLoss(
        state.head,
        state.recipe.rollout.temperature,
        settings,
        state.token_loss,
        _on_device(plan, state.device),
        arrays.teacher_logprobs_N.to(state.device),
        KeptTeachers() if teachers is None else teachers.kept,
    )
    result = _updates(state, index, micro_batches, settings, arrays, plan, function, start)
    if teachers is not None:
        result.timings["forward_backward_s"] -= teachers.seconds
        result.timings["teacher_s"] = teachers.seconds
    return result


def _not_applied(why: str) -> StepResult:
    return StepResult(0, why, {}, _timings(0.0, 0.0, 0.0), {})


def _updates(
    state: LearnerState,
    index: BatchIndex,
    micro_batches: Sequence[MicroBatch],
    settings: LossSettings,
    arrays: BatchArrays,
    plan: TokenPlan,
    function: MicroLoss,
    start: float,
) -> StepResult:
    """All updates on a planned batch; an update that must not be applied is the last one."""
    names = value_names(settings, clipped=plan.old_logprobs_N is not None)
    optimizer = state.require_loaded()
    metrics: dict[str, float] = {}
    first: Values = {}
    why_not, updates, optimizer_s = None, 0, 0.0
    learning_rate = float(optimizer.param_groups[0]["lr"])
    while why_not is None and updates < settings.updates_per_step:
        for model in state.models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = run_micro_batches(
            state.models,
            state.groups,
            micro_batches,
            function,
            forward_only=False,
            mark=state.mark,
        )
        values = in_batch_order(
            outputs, names, index.num_response_tokens, state.groups, state.device
        )
        state.mark("the end of the step")
        norm = gradient_norm(optimizer)
        why_not = _why_not(state, values, plan, norm, index)
        begin = time.perf_counter()
        if why_not is None:
            apply_gradients(optimizer, norm)
            updates += 1
        optimizer_s += time.perf_counter() - begin
        seen = step_metrics(settings, arrays, plan, values) | {"train/grad_norm": norm}
        if not first:
            first, metrics = values, seen
        elif "train/clipped_frac" in seen:  # the first update clips nothing
            metrics["train/clipped_frac"] = seen["train/clipped_frac"]
    if updates:
        gather_parameters(state.models)
        assert state.scheduler is not None
        state.scheduler.step(1)
        state.optimizer_step += 1
    metrics |= {"train/lr": learning_rate, "train/updates": float(updates)}
    end = time.perf_counter()
    return StepResult(
        updates=updates,
        why_not_applied=why_not,
        # A step that was refused for a NaN has NaN metrics, which JSON can not carry.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        timings=_timings(start, end - optimizer_s, end),
        values=first,
    )


def _timings(start: float, forwarded: float, end: float) -> dict[str, float]:
    return {
        "forward_backward_s": forwarded - start,
        "optimizer_s": end - forwarded,
        "total_s": end - start,
    }


def _on_device(plan: TokenPlan, device: torch.device) -> TokenPlan:
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(plan)
        if isinstance(value := getattr(plan, field.name), torch.Tensor)
    }
    return dataclasses.replace(plan, **moved)


def packed_batch(state: LearnerState, index: BatchIndex, read: ReadSamples) -> list[MicroBatch]:
    """This rank's micro-batches of a batch."""
    return pack_for_rank(
        index,
        read,
        state.layout,
        state.groups,
        state.recipe.batch,
        state.arch.vocab_size,
        state.teachers,
    )


def _first_bad(values: Values, index: BatchIndex) -> str | None:
    """The first value that is not finite, with the sample and response token it belongs to."""
    for kind, values_N in values.items():
        bad_N = ~torch.isfinite(values_N)
        if bool(bad_N.any()):
            row = int(bad_N.nonzero()[0])
            sample = int(np.searchsorted(index.response_offsets, row, side="right")) - 1
            position = row - int(index.response_offsets[sample])
            return f"{kind} is not finite: sample {index.sample_ids[sample]}, response token {position}"
    return None


def _first_bad_gradient(state: LearnerState) -> str | None:
    """Hugging Face names in this rank's first parameter with a NaN or infinite gradient."""
    for unit, parameter in hf.local_parameters(state.modules, state.arch):
        if not bool(torch.isfinite(getattr(parameter, "main_grad")).all()):  # noqa: B009
            return " + ".join(unit.hf)
    return None


def _why_not(
    state: LearnerState, values: Values, plan: TokenPlan, norm: float, index: BatchIndex
) -> str | None:
    """The reason not to apply an update, the same on all ranks, or None."""
    kept = {
        kind: torch.where(plan.mask_N, values[name], torch.zeros_like(values[name]))
        for kind, name in (
            ("student log-prob", "student_logprobs"),
            ("student entropy", "student_entropy"),
            ("loss", "losses"),
        )
    }
    bad = _first_bad(kept, index)
    if bad is not None or math.isfinite(norm):
        return bad
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, _first_bad_gradient(state))
    culprits = [f"{name} on rank {rank}" for rank, name in enumerate(names) if name]
    return (
        f"the gradient is not finite (norm {norm}): {', '.join(culprits) or 'overflow of the norm'}"
    )
