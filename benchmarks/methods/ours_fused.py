"""Our fused core from hidden states (gradient in forward, recompute) and with a dense teacher.

The backend is the compiled one on a CPU and what "auto" picks on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.inputs import Inputs
from benchmarks.methods.ours import opd_loss
from benchmarks.objective import combine
from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.losses.divergences import reverse_kl
from opd_megatron.losses.fused.chunked import chunked_loss
from opd_megatron.losses.fused.dense import DenseStats, dense_stats
from opd_megatron.losses.fused.dense_chunked import chunked_dense_loss
from opd_megatron.losses.fused.recompute import recompute_token_stats
from opd_megatron.losses.fused.rows import Backend
from opd_megatron.losses.token_stats import TokenStats

Call = Callable[..., torch.Tensor]


def _backend(tensor: torch.Tensor) -> Backend:
    return "compiled" if tensor.device.type == "cpu" else "auto"


def _chunked(inputs: Inputs, topk: int, weight_main_grad: torch.Tensor | None) -> Call:
    support_ids_TK, _ = inputs.support(topk)

    def chunk_loss(stats: TokenStats, rows: slice) -> tuple[torch.Tensor, None]:
        return opd_loss(inputs, topk, stats, rows), None

    def call(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        loss, _ = chunked_loss(
            hidden_TH,
            weight_VH,
            inputs.target_ids_T,
            chunk_loss,
            support_ids_TJ=support_ids_TK,
            vocab_size=weight_VH.shape[0],
            backend=_backend(hidden_TH),
            weight_main_grad=weight_main_grad,
        )
        return loss

    return call


def chunked(inputs: Inputs, topk: int) -> Call:
    return _chunked(inputs, topk, None)


def chunked_into_main_grad(inputs: Inputs, topk: int) -> Call:
    """The weight's gradient goes to the float32 buffer that Megatron keeps, not to a new tensor."""
    main_grad_VH = torch.zeros_like(inputs.weight_VH, dtype=torch.float32, requires_grad=False)
    return _chunked(inputs, topk, main_grad_VH)


def recompute(inputs: Inputs, topk: int) -> Call:
    support_ids_TK, _ = inputs.support(topk)

    def call(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        stats = recompute_token_stats(
            hidden_TH,
            weight_VH,
            inputs.target_ids_T,
            support_ids_TJ=support_ids_TK,
            vocab_size=weight_VH.shape[0],
            backend=_backend(hidden_TH),
        )
        return opd_loss(inputs, topk, stats)

    return call


def _dense(inputs: Inputs, *, grad_in_place: bool) -> Call:
    divergence = reverse_kl(ObjectiveConfig())

    def call(logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
        stats = dense_stats(
            logits_TV,
            teacher_logits_TV,
            inputs.target_ids_T,
            divergence,
            vocab_size=logits_TV.shape[1],
            backend=_backend(logits_TV),
            grad_in_place=grad_in_place,
        )
        return combine(inputs, kl_T=stats.divergence_T)

    return call


def dense(inputs: Inputs, topk: int) -> Call:
    del topk
    return _dense(inputs, grad_in_place=False)


def dense_in_place(inputs: Inputs, topk: int) -> Call:
    del topk
    return _dense(inputs, grad_in_place=True)


def dense_head(inputs: Inputs, topk: int) -> Call:
    """Both heads by one matrix product each, then the dense form over the student's logits."""
    del topk
    from_logits = _dense(inputs, grad_in_place=True)

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


def _dense_chunked(inputs: Inputs, weight_main_grad: torch.Tensor | None) -> Call:
    divergence = reverse_kl(ObjectiveConfig())

    def chunk_loss(stats: DenseStats, rows: slice) -> tuple[torch.Tensor, None]:
        return (inputs.token_weights_T[rows] * stats.divergence_T).sum(), None

    def call(
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        teacher_hidden_TH: torch.Tensor,
        teacher_weight_VH: torch.Tensor,
    ) -> torch.Tensor:
        def teacher_logits(rows: slice) -> torch.Tensor:
            return teacher_hidden_TH[rows] @ teacher_weight_VH.t()

        loss, _ = chunked_dense_loss(
            hidden_TH,
            weight_VH,
            teacher_logits,
            inputs.target_ids_T,
            divergence,
            chunk_loss,
            vocab_size=weight_VH.shape[0],
            backend=_backend(hidden_TH),
            weight_main_grad=weight_main_grad,
        )
        return loss

    return call


def dense_chunked(inputs: Inputs, topk: int) -> Call:
    del topk
    return _dense_chunked(inputs, None)


def dense_chunked_into_main_grad(inputs: Inputs, topk: int) -> Call:
    """The weight's gradient goes to the float32 buffer that Megatron keeps, not to a new tensor."""
    del topk
    main_grad_VH = torch.zeros_like(inputs.weight_VH, dtype=torch.float32, requires_grad=False)
    return _dense_chunked(inputs, main_grad_VH)
