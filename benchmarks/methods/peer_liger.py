"""Liger: its chunked torch path of the fused linear divergence, beta = 1, which is the reverse KL.

Its default chunk is 1024 tokens, more than a CPU case has; `jsd_in_eighths` gives it the share of the
batch that a chunk would be at 8192 tokens. It averages over the tokens whose label is not -100; masked
tokens get that label and the mean is scaled back to this benchmark's weights. Its Triton kernels start
at the same tensors but need CUDA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
    LigerFusedLinearJSDLoss,
)

from benchmarks.inputs import Inputs

Call = Callable[..., torch.Tensor]


def jsd(inputs: Inputs, topk: int) -> Call:
    del topk
    return _jsd(inputs, 1024)


def jsd_in_eighths(inputs: Inputs, topk: int) -> Call:
    del topk
    return _jsd(inputs, -(-inputs.target_ids_T.shape[0] // 8))


def _jsd(inputs: Inputs, chunk_size: int) -> Call:
    loss_function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1, chunk_size=chunk_size
    )
    labels_T = inputs.target_ids_T.masked_fill(inputs.token_weights_T == 0, -100)
    scale = inputs.token_weights_T.sum()

    def call(
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        teacher_hidden_TH: torch.Tensor,
        teacher_weight_VH: torch.Tensor,
    ) -> torch.Tensor:
        mean = loss_function(hidden_TH, weight_VH, teacher_hidden_TH, teacher_weight_VH, labels_T)
        return mean * scale

    return call
