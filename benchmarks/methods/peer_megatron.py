"""Megatron-Core: vocabulary-parallel cross-entropy, in a tensor-parallel group of one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from benchmarks.inputs import Inputs
from benchmarks.methods import one_rank
from benchmarks.objective import combine

Call = Callable[..., torch.Tensor]


def cross_entropy(inputs: Inputs, topk: int) -> Call:
    del topk
    one_rank.start(inputs.target_ids_T.device.type)

    def call(logits_TV: torch.Tensor) -> torch.Tensor:
        nll_T = vocab_parallel_cross_entropy(logits_TV, inputs.target_ids_T)
        return combine(inputs, sampled_logprobs_T=-nll_T)

    return call
