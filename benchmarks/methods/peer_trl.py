"""TRL: its log-prob and entropy functions, GKD's loss, and the two functions that start at hidden states.

On a CPU its Triton kernels are out of reach and it takes its own torch path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer  # pyright: ignore[reportMissingImports]
from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
    ChunkedDivergenceFunction,
)
from trl.kernels.chunked_logprob import (  # pyright: ignore[reportMissingImports]
    ChunkedLogProbFunction,
)
from trl.trainer.utils import (  # pyright: ignore[reportMissingImports]
    entropy_from_logits,
    selective_log_softmax,
)

from benchmarks.inputs import Inputs
from benchmarks.objective import combine, topk_kl_T

Call = Callable[..., torch.Tensor]
# The chunk that TRL's trainers pass (`chunk_size` of SFT's chunked loss is their own choice); here
# the vocabulary tile of its divergence function, for both.
_VOCAB_CHUNK = 32768


def selective(inputs: Inputs, topk: int) -> Call:
    ids_TK, teacher_logprobs_TK = inputs.support(topk)
    ids_TJ = torch.cat([inputs.target_ids_T[:, None], ids_TK], dim=1)

    def call(logits_TV: torch.Tensor) -> torch.Tensor:
        logprobs_TJ = selective_log_softmax(logits_TV, ids_TJ)
        return combine(
            inputs,
            kl_T=topk_kl_T(logprobs_TJ[:, 1:], teacher_logprobs_TK),
            sampled_logprobs_T=logprobs_TJ[:, 0],
            entropy_T=entropy_from_logits(logits_TV),
        )

    return call


def gkd(inputs: Inputs, topk: int) -> Call:
    """beta = 1 is the reverse KL; reduction "none" gives [1, T, V], summed over V here."""
    del topk

    def call(logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
        terms_TV = GKDTrainer.generalized_jsd_loss(
            logits_TV[None], teacher_logits_TV[None], beta=1, reduction="none"
        )
        return combine(inputs, kl_T=terms_TV.sum(-1)[0])

    return call


def chunked_logprob(inputs: Inputs, topk: int) -> Call:
    del topk

    def call(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        logprobs_T, entropy_T, *_ = ChunkedLogProbFunction.apply(
            hidden_TH,
            weight_VH,
            None,
            inputs.target_ids_T,
            1.0,
            _VOCAB_CHUNK,
            None,
            1.0,
            ("entropy",),
        )
        return combine(inputs, sampled_logprobs_T=logprobs_T, entropy_T=entropy_T)

    return call


def chunked_divergence(inputs: Inputs, topk: int) -> Call:
    del topk

    def call(
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        teacher_hidden_TH: torch.Tensor,
        teacher_weight_VH: torch.Tensor,
    ) -> torch.Tensor:
        divergence_T, _ = ChunkedDivergenceFunction.apply(
            hidden_TH, weight_VH, None, teacher_hidden_TH, teacher_weight_VH, None, 1.0
        )
        return combine(inputs, kl_T=divergence_T)

    return call
