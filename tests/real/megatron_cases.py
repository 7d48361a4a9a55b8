"""Which layouts, batches and objectives the learner is compared in. Imports no torch.

Every case is run with every objective. The batches: uneven documents with an empty response, in one micro-batch a rank
or in several; then one sample alone, so that all data-parallel ranks but one have no token, and some context-parallel
ranks none that counts: its response is short and lies in few pieces of the document.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opd_megatron.config.schema import ObjectiveConfig

VOCAB = 259  # odd, so that padded columns and an uneven last shard exist
TOPK = 8
LENGTHS = [
    [(3, 9), (5, 1), (2, 20), (7, 0), (1, 14), (4, 4), (9, 17), (2, 2), (6, 11), (3, 0)],
    [(13, 3)],
]

# One line per objective, and how many of the teacher's tokens its batches carry; its reference is the function of that
# name in megatron_reference.py.
OBJECTIVES = {
    "sampled_token": (ObjectiveConfig(), 0),
    "topk_support": (ObjectiveConfig(estimator="support_matching", topk=TOPK), TOPK),
    "full_vocabulary": (
        ObjectiveConfig(estimator="support_matching", topk=VOCAB, measure="renormalized"),
        VOCAB,
    ),
}


@dataclass(frozen=True)
class Case:
    """A student, a layout of the learner and of the batch.

    `alignment`: of the tokens of a rank, as FP8 kernels want it.
    """

    learner: dict[str, Any] = field(default_factory=dict[str, Any])
    tied: bool = False
    family: str = "qwen3"
    tokens_per_microbatch: int = 64
    padded: bool = False
    alignment: int = 1


def _case(
    *,
    tied: bool = False,
    family: str = "qwen3",
    tokens: int = 64,
    padded: bool = False,
    aligned: int = 1,
    **keys: Any,
) -> Case:
    names = {
        "tp": "tensor_parallel",
        "pp": "pipeline_parallel",
        "vpp": "virtual_pipeline",
        "cp": "context_parallel",
        "sp": "sequence_parallel",
        "do": "distributed_optimizer",
        "overlap": "overlap_param_gather",
    }
    learner = {names.get(key, key): value for key, value in keys.items()}
    return Case(learner, tied, family, tokens, padded, aligned)


CASES = {
    1: {
        "one_process": _case(),
        "one_process_tied_recompute": _case(tied=True, recompute=True),
        "one_process_qwen2_tied": _case(tied=True, family="qwen2"),
        "one_process_llama": _case(family="llama"),
    },
    2: {
        "dp2": _case(),
        "dp2_tied_one_micro_batch": _case(tied=True, tokens=256),
        "dp2_distributed_optimizer": _case(do=True, tokens=32),
        "dp2_overlapped_gather": _case(do=True, overlap=True, tokens=32),
        "dp2_padded_tied": _case(tied=True, padded=True),
        "tp2": _case(tp=2),
        "tp2_tied_distributed_optimizer": _case(tp=2, do=True, tied=True),
        "tp2_sp_qwen2": _case(tp=2, sp=True, family="qwen2"),
        "tp2_sp_recompute_tied": _case(tp=2, sp=True, recompute=True, tied=True),
        "tp2_sp_padded_aligned": _case(tp=2, sp=True, padded=True, aligned=16),
        "pp2": _case(pp=2, tokens=32),
        "pp2_recompute_tied": _case(pp=2, recompute=True, tied=True),
        "pp2_interleaved": _case(pp=2, vpp=2, tokens=32),
        "pp2_interleaved_tied": _case(pp=2, vpp=2, tied=True),
        "pp2_interleaved_recompute_padded": _case(pp=2, vpp=2, recompute=True, padded=True),
        "cp2_llama": _case(cp=2, family="llama"),
        "cp2_tied_distributed_optimizer": _case(cp=2, do=True, tied=True),
        "cp2_padded_recompute": _case(cp=2, padded=True, recompute=True),
        # The modes of the loss; every other case has the gradient written over the logits.
        "dp2_stored_logits_qwen2": _case(loss_mode="stored", family="qwen2"),
        "dp2_chunked_loss_tied": _case(loss_mode="chunked", tied=True),
        "dp2_overlapped_chunked_loss": _case(loss_mode="chunked", do=True, overlap=True, tokens=32),
        "tp2_chunked_loss": _case(tp=2, loss_mode="chunked"),
        "tp2_sp_padded_chunked_loss_tied": _case(
            tp=2, sp=True, padded=True, loss_mode="chunked", tied=True
        ),
        "tp2_sp_recomputed_logits": _case(tp=2, sp=True, loss_mode="recompute"),
        "pp2_recomputed_logits_tied": _case(pp=2, loss_mode="recompute", tied=True),
        "pp2_interleaved_chunked_loss": _case(pp=2, vpp=2, loss_mode="chunked"),
    },
    4: {
        "dp4_tied": _case(tied=True),
        "dp4_distributed_optimizer": _case(do=True, tokens=25),
        "tp2_dp2_sp_distributed_optimizer": _case(tp=2, sp=True, do=True),
        "tp2_pp2_tied": _case(tp=2, pp=2, tied=True),
        "tp2_pp2_sp_qwen2": _case(tp=2, pp=2, sp=True, family="qwen2"),
        "tp2_pp2_sp_interleaved_tied": _case(tp=2, pp=2, vpp=2, sp=True, tied=True),
        "tp2_cp2_sp": _case(tp=2, cp=2, sp=True),
        "tp2_cp2_tied_padded": _case(tp=2, cp=2, tied=True, padded=True),
        "pp2_cp2_llama": _case(pp=2, cp=2, family="llama"),
        "pp2_cp2_interleaved_recompute": _case(pp=2, vpp=2, cp=2, recompute=True),
        "pp2_dp2_tied_distributed_optimizer": _case(pp=2, do=True, tied=True),
        "pp2_dp2_interleaved_distributed_optimizer": _case(pp=2, vpp=2, do=True),
        "pp2_dp2_interleaved_overlapped_gather": _case(pp=2, vpp=2, do=True, overlap=True),
        "pp2_dp2_overlapped_recomputed_logits_tied": _case(
            pp=2, do=True, overlap=True, loss_mode="recompute", tied=True, tokens=32
        ),
        "cp2_dp2_distributed_optimizer": _case(cp=2, do=True),
        "cp4_tied": _case(cp=4, tied=True),
        "pp4": _case(pp=4, tokens=25),
    },
}

# Saved in the first, loaded in the second; where both are the same, bits must be equal.
MOVES = {
    "tp2-to-tp2": (CASES[2]["tp2"], CASES[2]["tp2"]),
    "dp2_do-to-dp2_do": (_case(do=True), _case(do=True)),
    "pp2_interleaved-to-itself": (_case(pp=2, vpp=2), _case(pp=2, vpp=2)),
    "tp2-to-pp2": (_case(tp=2), _case(pp=2)),
    "pp2-to-dp2": (_case(pp=2), _case()),
    "dp2_do-to-tp2_do": (_case(do=True), _case(tp=2, do=True)),
    "tp2_sp-to-pp2_interleaved": (_case(tp=2, sp=True), _case(pp=2, vpp=2)),
    "pp2_interleaved-to-cp2": (_case(pp=2, vpp=2), _case(cp=2)),
    "dp2_do-to-dp2": (_case(do=True), _case()),
    "pp2-to-dp2_do": (_case(pp=2), _case(do=True)),
}
# Saved in the first, loaded and saved again in the second, loaded in the first: bits must be equal, also in bf16, where
# the optimizer holds weights of its own.
ROUND_TRIPS = {
    "bf16-dp2_do-and-dp2": (_case(do=True), _case()),
    "bf16-tp2-and-tp2_do": (_case(tp=2), _case(tp=2, do=True)),
    "bf16-tp2-and-pp2_do": (_case(tp=2), _case(pp=2, do=True)),
    "fp32-cp2_do-and-pp2_interleaved": (_case(cp=2, do=True), _case(pp=2, vpp=2)),
}
BITWISE_MOVES = [name for name, (first, second) in MOVES.items() if first == second]
BROKEN = {
    "dp2": _case(),
    "dp2_distributed_optimizer": _case(do=True),
    "tp2": _case(tp=2),
    "pp2": _case(pp=2),
    "pp2_interleaved": _case(pp=2, vpp=2),
}


@dataclass(frozen=True)
class Resumed:
    """A layout in which a run is split at every step."""

    case: Case
    precision: str = "fp32"


STEPS = 20
# The first is in every run of the suite, the others are slow.
RESUMED = {
    "dp2_distributed_optimizer_bf16": Resumed(_case(do=True), "bf16"),
    "tp2_sp": Resumed(_case(tp=2, sp=True)),
    "pp2_interleaved_bf16": Resumed(_case(pp=2, vpp=2), "bf16"),
    "cp2_distributed_optimizer": Resumed(_case(cp=2, do=True)),
}
