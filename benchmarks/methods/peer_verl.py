"""verl: the top-K forward KL of its two engines, with the entropy and log-prob that they compute beside it.

The order of calls is that of verl's engines (`verl/workers/engine/{fsdp,megatron}`): FSDP compiles
`entropy_from_logits` by default, Megatron keeps a copy of the logits for what runs after the entropy.
The KL is a scalar per token with fixed direction; its K log-probs are not given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from verl.trainer.distillation.fsdp import losses as fsdp_losses  # pyright: ignore[reportMissingImports]
from verl.trainer.distillation.megatron import (  # pyright: ignore[reportMissingImports]
    losses as megatron_losses,
)
from verl.utils.megatron.tensor_parallel import (  # pyright: ignore[reportMissingImports]
    vocab_parallel_entropy,
    vocab_parallel_log_probs_from_logits,
)
from verl.utils.torch_functional import (  # pyright: ignore[reportMissingImports]
    entropy_from_logits,
    logprobs_from_logits,
)
from verl.workers.config import (  # pyright: ignore[reportMissingImports]
    DistillationConfig,
    DistillationLossConfig,
)

from benchmarks.inputs import Inputs
from benchmarks.methods import one_rank
from benchmarks.objective import combine

Call = Callable[..., torch.Tensor]


def _config(chunk_tokens: int | None) -> DistillationConfig:
    """verl's defaults, without the clamp of log-probs at -10, which changes the gradient."""
    return DistillationConfig(
        distillation_loss=DistillationLossConfig(
            loss_mode="forward_kl_topk",
            log_prob_min_clamp=None,
            use_policy_gradient=False,
            use_chunked_topk=chunk_tokens is not None,
            chunked_topk_chunk_size=chunk_tokens or 1,
        )
    )


def _fsdp(
    inputs: Inputs,
    topk: int,
    *,
    with_topk: bool = True,
    with_policy: bool = True,
    num_chunks: int = 0,
) -> Call:
    ids_TK, teacher_logprobs_TK = inputs.support(topk)
    # verl takes a batch of ragged sequences; this is one sequence of T tokens.
    ids = torch.nested.nested_tensor([ids_TK], layout=torch.jagged)
    teacher_logprobs = torch.nested.nested_tensor([teacher_logprobs_TK], layout=torch.jagged)
    chunk_tokens = -(-ids_TK.shape[0] // num_chunks) if num_chunks else None
    config = _config(chunk_tokens)
    compiled_entropy = torch.compile(entropy_from_logits, dynamic=True)

    def call(logits_TV: torch.Tensor) -> torch.Tensor:
        entropy_T = compiled_entropy(logits_TV) if with_policy else None
        kl_T = None
        if with_topk:
            outputs = fsdp_losses.compute_forward_kl_topk(
                logits_TV[None], teacher_logprobs, ids, config, "thd"
            )
            kl_T = outputs["distillation_losses"][0]
        logprobs_T = None
        if with_policy:
            logprobs_T = logprobs_from_logits(
                logits_TV, inputs.target_ids_T, inplace_backward=False
            )
        return combine(inputs, kl_T=kl_T, sampled_logprobs_T=logprobs_T, entropy_T=entropy_T)

    return call


# "Chunked" in eighths: its default of 4096 tokens at a sequence of 32,768.
fsdp = partial(_fsdp)
fsdp_chunked = partial(_fsdp, num_chunks=8)
fsdp_topk_only = partial(_fsdp, with_policy=False)
fsdp_logprob_entropy = partial(_fsdp, with_topk=False)


def megatron(inputs: Inputs, topk: int) -> Call:
    one_rank.start(inputs.target_ids_T.device.type)
    ids_TK, teacher_logprobs_TK = inputs.support(topk)

    def call(logits_TV: torch.Tensor) -> torch.Tensor:
        logits = logits_TV[None]
        copy = logits.clone()
        entropy_T = vocab_parallel_entropy(logits)[0]
        kl, *_ = megatron_losses._VocabParallelKLDivergence.apply(
            copy, teacher_logprobs_TK[None], ids_TK[None], None
        )
        logprobs = vocab_parallel_log_probs_from_logits(copy, inputs.target_ids_T[None])
        return combine(inputs, kl_T=kl[0], sampled_logprobs_T=logprobs[0], entropy_T=entropy_T)

    return call
