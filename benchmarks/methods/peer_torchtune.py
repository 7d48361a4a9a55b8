"""torchtune: reverse KL against dense teacher logits, in the eight chunks that are its default."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchtune.modules.loss import (  # pyright: ignore[reportMissingImports]
    ReverseKLWithChunkedOutputLoss,
)

from benchmarks.inputs import Inputs

Call = Callable[..., torch.Tensor]


def reverse_kl(inputs: Inputs, topk: int) -> Call:
    """A mean over unmasked tokens, scaled back to this benchmark's weights."""
    del topk
    loss_function = ReverseKLWithChunkedOutputLoss()
    labels_T = inputs.target_ids_T.masked_fill(inputs.token_weights_T == 0, -100)
    scale = inputs.token_weights_T.sum()
    num_chunks = loss_function.num_output_chunks

    def call(logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
        mean = loss_function(
            list(logits_TV[None].chunk(num_chunks, dim=1)),
            list(teacher_logits_TV[None].chunk(num_chunks, dim=1)),
            labels_T[None],
        )
        return mean * scale

    return call
