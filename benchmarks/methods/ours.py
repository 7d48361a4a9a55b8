"""Our fused core on stored logits, one function for each backend, with its own storage for the
gradient or with the gradient written over the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.inputs import Inputs
from benchmarks.objective import combine, topk_kl_T
from opd_megatron.losses.fused.rows import Backend
from opd_megatron.losses.token_stats import TokenStats, token_stats

Call = Callable[..., torch.Tensor]


def opd_loss(
    inputs: Inputs, topk: int, stats: TokenStats, rows: slice = slice(None)
) -> torch.Tensor:
    """The whole top-K loss from our statistics, for the tokens in `rows`."""
    if stats.support_logprobs_TJ is None:
        raise ValueError("support_logprobs_TJ: None seen, the loss needs the support")
    return combine(
        inputs,
        kl_T=topk_kl_T(stats.support_logprobs_TJ, inputs.support(topk)[1][rows]),
        sampled_logprobs_T=stats.sampled_logprobs_T,
        entropy_T=stats.entropy_T,
        rows=rows,
    )


def _stored(inputs: Inputs, topk: int, *, backend: Backend, grad_in_place: bool) -> Call:
    support_ids_TK, _ = inputs.support(topk)

    def call(logits_TV: torch.Tensor) -> torch.Tensor:
        stats = token_stats(
            logits_TV,
            inputs.target_ids_T,
            support_ids_TJ=support_ids_TK,
            vocab_size=logits_TV.shape[1],
            backend=backend,
            grad_in_place=grad_in_place,
        )
        return opd_loss(inputs, topk, stats)

    return call


stored_torch = partial(_stored, backend="torch", grad_in_place=False)
in_place_torch = partial(_stored, backend="torch", grad_in_place=True)
stored_compiled = partial(_stored, backend="compiled", grad_in_place=False)
in_place_compiled = partial(_stored, backend="compiled", grad_in_place=True)
stored_triton = partial(_stored, backend="triton", grad_in_place=False)
in_place_triton = partial(_stored, backend="triton", grad_in_place=True)
