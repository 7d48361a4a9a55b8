"""How far the student is from the teachers inside the learner, on given samples: exact, without a step.

    student_logprobs, teacher_logprobs      of the sampled tokens
    student_entropy, teacher_entropy        over the whole vocabulary, as both KLs:
    kl_reverse                              KL(student || teacher)
    kl_forward                              KL(teacher || student)

All at temperature 1, per response token, in batch order. The checks before step one and the held-out
evaluation read them. Both models' logits of one micro-batch exist at a time.
"""

from __future__ import annotations

import torch

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.errors import ContractError
from opd_megatron.exchange.batch_file import BatchIndex
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.megatron.forward import in_batch_order, run_micro_batches
from opd_megatron.megatron.micro_loss import SCORE_NAMES, MicroCompare
from opd_megatron.megatron.state import LearnerState
from opd_megatron.megatron.step import ReadSamples, packed_batch
from opd_megatron.megatron.teacher_pass import score_in_process
from opd_megatron.teacher.target import is_inside

_KLS = {"kl_reverse": "reverse_kl", "kl_forward": "forward_kl"}


def compare(state: LearnerState, index: BatchIndex, read: ReadSamples) -> dict[str, torch.Tensor]:
    """The values of the module docstring, [sum L] float32 each. Collective.

    Raises:
        ContractError: a sample's teacher is not inside the learner.
    """
    state.require_weights()
    for sample_id, name in zip(index.sample_ids, index.teachers, strict=True):
        if not is_inside(name, state.teachers):
            raise ContractError(
                f"sample {sample_id}: teacher {name!r} is not inside the learner "
                f"({sorted(state.teachers)})"
            )
    micro_batches = packed_batch(state, index, read)
    teachers = score_in_process(state, index, micro_batches, keep_hidden=True)
    if teachers is None:
        raise ContractError("compare: the batch has no sample")
    function = MicroCompare(
        state.head,
        teachers.kept,
        {
            name: make_divergence(ObjectiveConfig(divergence=divergence))
            for name, divergence in _KLS.items()
        },
    )
    outputs = run_micro_batches(
        state.models,
        state.groups,
        micro_batches,
        function,
        forward_only=True,
        mark=state.mark,
    )
    values = in_batch_order(
        outputs, (*SCORE_NAMES, *_KLS), index.num_response_tokens, state.groups, state.device
    )
    return values | {
        "teacher_logprobs": teachers.logprobs_N,
        "teacher_entropy": teachers.entropy_N,
    }
