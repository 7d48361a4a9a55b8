"""The teachers inside the learner over a batch: what the plan needs now, and what the loss needs later.

    per teacher     weights onto the device -> forward schedule over its own micro-batches -> off
      last stage    log-prob of the sampled token and entropy, kept; hidden states kept if the
                    loss looks at a support or at the whole vocabulary, or if the teacher is one of a mean
    per mean        log-prob and entropy of the mean, from the hidden states of its members
    once            sampled log-probs and entropies of the whole batch on every rank, in batch order

Teachers take turns before the student's first forward, so a step needs room for one of them. Kept
until the step ends is, on the last stage, S * H values a micro-batch and the output weight of each
teacher, not logits: those are made again for one micro-batch (the whole vocabulary) or a few rows of
it (supports) when the student's are there. Nothing but [T, K] ids and [T, J] log-probs leaves a
vocabulary shard.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from opd_megatron.data.packing import MicroBatch
from opd_megatron.exchange.batch_file import BatchIndex
from opd_megatron.losses.batch_plan import BatchArrays
from opd_megatron.megatron.forward import (
    DeviceMicroBatch,
    MicroOutput,
    MicroResult,
    in_batch_order,
    run_micro_batches,
)
from opd_megatron.megatron.state import LearnerState
from opd_megatron.megatron.teacher_mixture import MixedHead
from opd_megatron.megatron.teacher_model import InProcessTeacher, TeacherHead
from opd_megatron.teacher.target import Target, is_inside

_NAMES = ("teacher_logprobs", "teacher_entropy")


@dataclass(frozen=True)
class KeptTeachers:
    """On the last pipeline stage: hidden states by micro-batch and teacher, heads by teacher."""

    hidden_BSH: dict[tuple[int, str], torch.Tensor] = field(
        default_factory=dict[tuple[int, str], torch.Tensor]
    )
    heads: dict[str, TeacherHead] = field(default_factory=dict[str, TeacherHead])

    def of(self, batch: DeviceMicroBatch) -> tuple[TeacherHead | MixedHead, torch.Tensor]:
        """The head of the micro-batch's target and its hidden states, [T, H]; of a mean, of all members."""
        target = Target.parse(batch.scorer)
        heads = tuple(self.heads[name] for name in target.members)
        hidden = [
            head.gathered(self.hidden_BSH[batch.number, name])
            for name, head in zip(target.members, heads, strict=True)
        ]
        if not target.mean:
            return heads[0], hidden[0]
        return MixedHead(target, heads), torch.cat(hidden, dim=1)

    def forget(self) -> None:
        self.hidden_BSH.clear()
        self.heads.clear()


@dataclass(frozen=True)
class TeacherPass:
    """What the teachers inside the learner said of a batch.

    logprobs_N, entropy_N: [N] float32 in batch order, on the CPU; 0 where a served teacher scores.
    scored_N: [N] bool, where they do not.
    """

    logprobs_N: torch.Tensor
    entropy_N: torch.Tensor
    scored_N: torch.Tensor
    kept: KeptTeachers
    seconds: float

    def into(self, arrays: BatchArrays) -> BatchArrays:
        """The recorded arrays with these scores in their places."""
        recorded_N = arrays.teacher_entropy_N
        everywhere = bool(self.scored_N.all())
        entropy_N = None
        if everywhere:
            entropy_N = self.entropy_N
        elif recorded_N is not None:
            entropy_N = torch.where(self.scored_N, self.entropy_N, recorded_N)
        return dataclasses.replace(
            arrays,
            teacher_logprobs_N=torch.where(
                self.scored_N, self.logprobs_N, arrays.teacher_logprobs_N
            ),
            teacher_entropy_N=entropy_N,
            teacher_entropy_exact=everywhere,
        )


def score_in_process(
    state: LearnerState,
    index: BatchIndex,
    micro_batches: Sequence[MicroBatch],
    *,
    keep_hidden: bool,
    temperatures: Mapping[str, float] | None = None,
) -> TeacherPass | None:
    """Every teacher inside the learner over its own micro-batches; None where the batch has none. Collective.

    Args:
        temperatures: by teacher; 1 where none is given.
    """
    inside_B = [is_inside(name, state.teachers) for name in index.teachers]
    if not any(inside_B):
        return None
    begin = time.perf_counter()
    kept = KeptTeachers()
    outputs: list[MicroOutput] = []
    own = [micro for micro in micro_batches if micro.scorer]
    means: dict[int, DeviceMicroBatch] = {}
    for name in sorted(state.teachers):
        asked = [micro for micro in own if name in Target.parse(micro.scorer).members]
        if asked:
            teacher, temperature = state.teachers[name], (temperatures or {}).get(name, 1.0)
            outputs += _forward(state, teacher, temperature, asked, kept, keep_hidden, means)
    outputs += [_of_mean(kept, means[number]) for number in sorted(means)]
    if not keep_hidden:
        kept.forget()
    values = in_batch_order(outputs, _NAMES, index.num_response_tokens, state.groups, state.device)
    lengths = torch.from_numpy(index.response_offsets).diff()
    return TeacherPass(
        logprobs_N=values["teacher_logprobs"],
        entropy_N=values["teacher_entropy"],
        scored_N=torch.tensor(inside_B).repeat_interleave(lengths),
        kept=kept,
        seconds=time.perf_counter() - begin,
    )


def _forward(
    state: LearnerState,
    teacher: InProcessTeacher,
    temperature: float,
    micro_batches: Sequence[MicroBatch],
    kept: KeptTeachers,
    keep_hidden: bool,
    means: dict[int, DeviceMicroBatch],
) -> list[MicroOutput]:
    """One teacher over the micro-batches that ask it; those of a mean are noted in `means` and have no values yet."""

    def look(output_BSH: torch.Tensor, batch: DeviceMicroBatch) -> MicroResult:
        head = dataclasses.replace(teacher.head, temperature=temperature)
        is_mean = batch.scorer != teacher.name
        if keep_hidden or is_mean:
            kept.heads[teacher.name] = head
            kept.hidden_BSH[batch.number, teacher.name] = output_BSH
        if is_mean:
            means[batch.number] = batch
        values = {} if is_mean else _values(head, head.gathered(output_BSH), batch)
        return MicroResult(output_BSH.new_zeros(()), (batch.output_index_T >= 0).sum(), values)

    with teacher.on_device():
        outputs = run_micro_batches(
            teacher.modules,
            state.groups,
            micro_batches,
            look,
            forward_only=True,
            mark=state.mark,
        )
    return [output for output in outputs if output.values]


def _of_mean(kept: KeptTeachers, batch: DeviceMicroBatch) -> MicroOutput:
    head, hidden_TX = kept.of(batch)
    return MicroOutput(_values(head, hidden_TX, batch), batch.output_index_T)


def _values(
    head: TeacherHead | MixedHead, hidden: torch.Tensor, batch: DeviceMicroBatch
) -> dict[str, torch.Tensor]:
    parts = [logits.stats(batch.target_ids_T[rows]) for rows, logits in head.chunks(hidden)]
    return {
        "teacher_logprobs": torch.cat([part.sampled_logprobs_T for part in parts]),
        "teacher_entropy": torch.cat([part.entropy_T for part in parts]),
    }
