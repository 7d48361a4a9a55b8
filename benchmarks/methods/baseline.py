"""What one writes first: float32 log-softmax over everything, kept by autograd; and its checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.inputs import Inputs
from benchmarks.objective import combine, topk_kl_T

Call = Callable[..., torch.Tensor]
_NUM_CHECKPOINTED_CHUNKS = 16


def _stats(logits_TV: torch.Tensor, ids_TJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs at the ids [T, J] and entropy [T], float32."""
    logp_TV = logits_TV.float().log_softmax(-1)
    return logp_TV.gather(1, ids_TJ), -(logp_TV.exp() * logp_TV).sum(-1)


def _ids_TJ(inputs: Inputs, topk: int) -> torch.Tensor:
    return torch.cat([inputs.target_ids_T[:, None], inputs.support(topk)[0]], dim=1)


def _loss(
    inputs: Inputs, topk: int, logprobs_TJ: torch.Tensor, entropy_T: torch.Tensor
) -> torch.Tensor:
    return combine(
        inputs,
        kl_T=topk_kl_T(logprobs_TJ[:, 1:], inputs.support(topk)[1]),
        sampled_logprobs_T=logprobs_TJ[:, 0],
        entropy_T=entropy_T,
    )


def naive(inputs: Inputs, topk: int) -> Call:
    ids_TJ = _ids_TJ(inputs, topk)

    def call(logits_TV: torch.Tensor) -> torch.Tensor:
        return _loss(inputs, topk, *_stats(logits_TV, ids_TJ))

    return call


def checkpointed(inputs: Inputs, topk: int) -> Call:
    """The naive statistics, recomputed in backward for one chunk of rows after the other."""
    ids_TJ = _ids_TJ(inputs, topk)

    def call(logits_TV: torch.Tensor) -> torch.Tensor:
        chunks = zip(
            logits_TV.chunk(_NUM_CHECKPOINTED_CHUNKS),
            ids_TJ.chunk(_NUM_CHECKPOINTED_CHUNKS),
            strict=True,
        )
        stats = [checkpoint(_stats, *chunk, use_reentrant=False) for chunk in chunks]
        logprobs_TJ = torch.cat([logprobs for logprobs, _ in stats])
        return _loss(inputs, topk, logprobs_TJ, torch.cat([entropy for _, entropy in stats]))

    return call


def naive_head(inputs: Inputs, topk: int) -> Call:
    from_logits = naive(inputs, topk)

    def call(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return from_logits(hidden_TH @ weight_VH.t())

    return call


def naive_dense(inputs: Inputs, topk: int) -> Call:
    del topk

    def call(logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
        logp_TV = logits_TV.float().log_softmax(-1)
        gap_TV = logp_TV - teacher_logits_TV.float().log_softmax(-1)
        return combine(inputs, kl_T=(logp_TV.exp() * gap_TV).sum(-1))

    return call


def naive_dense_head(inputs: Inputs, topk: int) -> Call:
    from_logits = naive_dense(inputs, topk)

    def call(
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        teacher_hidden_TH: torch.Tensor,
        teacher_weight_VH: torch.Tensor,
    ) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits_TV = teacher_hidden_TH @ teacher_weight_VH.t()
        return from_logits(hidden_TH @ weight_VH.t(), teacher_logits_TV)

    return call
