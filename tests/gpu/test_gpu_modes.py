"""Every mode of the loss core on the device against float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import Case, HandedOver, assert_same_gradient, assert_same_outputs, probe_loss

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.losses.divergences import DIVERGENCES, make_divergence
from opd_megatron.losses.fused.chunked import chunked_loss
from opd_megatron.losses.fused.dense import dense_stats
from opd_megatron.losses.fused.recompute import recompute_token_stats
from opd_megatron.losses.token_stats import TokenStats, token_stats

pytestmark = pytest.mark.gpu

CASE = Case(11, 1100, 1061, 6, torch.float32)
WIDTH = 32


def head(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(CASE.num_tokens, WIDTH, generator=generator)
    weight = torch.randn(CASE.num_columns, WIDTH, generator=generator) * 0.3
    return hidden.to(device, dtype), weight.to(device, dtype)


def local_loss(stats: TokenStats, rows: slice) -> tuple[torch.Tensor, slice]:
    assert stats.support_logprobs_TJ is not None
    loss_T = stats.sampled_logprobs_T.exp() + 0.3 * stats.entropy_T + stats.log_z_T.square()
    return (loss_T + (stats.support_logprobs_TJ.square()).sum(-1)).sum(), rows


def exact_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, kwargs: dict[str, Any], local: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = hidden.double().cpu().requires_grad_()
    weight = weight.double().cpu().requires_grad_()
    kwargs = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    stats = token_stats(hidden @ weight.T, **kwargs)
    loss = local_loss(stats, slice(0, 0))[0] if local else probe_loss(stats)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["chunked", "recompute"])
def test_head_modes_equal_float64(mode: str, dtype: torch.dtype, device: torch.device) -> None:
    _, targets, support = CASE.inputs(device)
    hidden, weight = (x.requires_grad_() for x in head(device, dtype))
    kwargs: dict[str, Any] = {
        "target_ids_T": targets,
        "support_ids_TJ": support,
        "vocab_size": CASE.vocab_size,
        "temperature": 0.9,
    }
    loss, hidden_grad, weight_grad = exact_gradients(
        hidden.detach(), weight.detach(), kwargs, mode == "chunked"
    )
    if mode == "chunked":
        seen, rows = chunked_loss(
            hidden, weight, chunk_loss=local_loss, chunk_tokens=4, backend="triton", **kwargs
        )
        assert [(r.start, r.stop) for r in rows] == [(0, 4), (4, 8), (8, 11)]
    else:
        seen = probe_loss(
            recompute_token_stats(hidden, weight, chunk_tokens=4, backend="triton", **kwargs)
        )
    seen.backward()
    assert hidden.grad is not None and weight.grad is not None
    # bfloat16 logits: each is off by up to 2^-9 of its size before any of this code sees it.
    relative = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b in ((seen.detach(), loss), (hidden.grad, hidden_grad), (weight.grad, weight_grad)):
        assert float((a.double().cpu() - b).norm() / b.norm()) < relative


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dense_mode_equals_float64(backend: Any, name: str, cuda_device: torch.device) -> None:
    device = cuda_device
    logits, targets, support = CASE.inputs(device)
    teacher, _, _ = CASE.inputs(device, seed=6)
    teacher[:, 7] = -float("inf")
    divergence = make_divergence(ObjectiveConfig(divergence=name))
    kwargs: dict[str, Any] = {"vocab_size": CASE.vocab_size, "teacher_temperature": 1.2}
    exact = logits.double().cpu().requires_grad_()
    wanted = dense_stats(
        exact,
        teacher.double().cpu(),
        targets.cpu(),
        divergence,
        support_ids_TJ=support.cpu(),
        **kwargs,
    )
    (wanted.divergence_T.sum() + probe_loss(wanted.student)).backward()
    leaf = logits.clone().requires_grad_()
    seen = dense_stats(
        HandedOver.apply(leaf),
        teacher,
        targets,
        divergence,
        support_ids_TJ=support,
        backend=backend,
        grad_in_place=True,
        **kwargs,
    )
    (seen.divergence_T.sum() + probe_loss(seen.student)).backward()
    assert leaf.grad is not None and exact.grad is not None
    scale = wanted.divergence_T.detach().abs()
    assert bool(
        (
            (seen.divergence_T.detach().double().cpu() - wanted.divergence_T).abs()
            <= 1e-4 * (1 + scale)
        ).all()
    )
    assert_same_outputs(seen.student, wanted.student)
    assert_same_outputs(seen.teacher, wanted.teacher)
    relative = (leaf.grad.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert float(relative) < 1e-4


def test_compiled_equals_float64(cuda_device: torch.device) -> None:
    device = cuda_device
    case = Case(5, 4219, 4201, 65, torch.bfloat16)
    logits, targets, support = case.inputs(device)
    exact = logits.double().cpu().requires_grad_()
    leaf = logits.clone().requires_grad_()
    wanted = token_stats(
        exact, targets.cpu(), support_ids_TJ=support.cpu(), vocab_size=4201, backend="torch"
    )
    seen = token_stats(leaf, targets, support_ids_TJ=support, vocab_size=4201, backend="compiled")
    probe_loss(wanted).backward()
    probe_loss(seen).backward()
    assert leaf.grad is not None and exact.grad is not None
    assert_same_gradient(leaf.grad, exact.grad)
