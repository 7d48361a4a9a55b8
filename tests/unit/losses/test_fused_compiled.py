"""The compiled row functions equal the eager ones, and compile once for all row counts.

One test compiles in the fast suite; the divergences, which compile one by one, are `slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_rank_worker import probe_loss

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.losses.divergences import DIVERGENCES, make_divergence
from opd_megatron.losses.fused.dense import dense_stats
from opd_megatron.losses.fused.support_gradient import summed_over_duplicates
from opd_megatron.losses.token_stats import token_stats

V, REAL = 520, 501


def inputs(num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with an impossible token, and ids [T, 1 + 6] with duplicates that avoid it."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = (torch.randn(num_tokens, V, generator=generator, dtype=torch.float64) * 3).to(dtype)
    logits[:, 1] = -float("inf")
    ids = torch.randint(2, REAL, (num_tokens, 7), generator=generator)
    ids[:, 3] = ids[:, 0]
    return logits, ids


def run(
    logits: torch.Tensor, ids: torch.Tensor, backend: Any, in_place: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    stats = token_stats(
        leaf * 1 if in_place else leaf,
        ids[:, 0],
        support_ids_TJ=ids[:, 1:],
        vocab_size=REAL,
        temperature=0.8,
        backend=backend,
        grad_in_place=in_place,
    )
    probe_loss(stats).backward()
    assert leaf.grad is not None and stats.support_logprobs_TJ is not None
    outputs = [stats.log_z_T, stats.entropy_T, stats.sampled_logprobs_T, stats.support_logprobs_TJ]
    return [x.detach() for x in outputs], leaf.grad


def test_compiled_equals_eager_for_every_row_count_and_compiles_once() -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters  # pyright: ignore
    counters.clear()
    for num_tokens in (1, 7, 40, 0, 3):
        logits, ids = inputs(num_tokens, torch.bfloat16)
        wanted, wanted_grad = run(logits, ids, "torch", False)
        for in_place in (True, False):
            seen, grad = run(logits, ids, "compiled", in_place)
            for a, b in zip(seen, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad, wanted_grad, rtol=2**-7, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # forward and backward


def test_duplicated_ids_sum_within_their_row() -> None:
    ids = torch.tensor([[3, 5, 3, -1, 3], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    values = torch.tensor([[1.0, 2, 4, 8, 16], [1, 2, 4, 8, 16], [1, 2, 4, 8, 16]])
    wanted = [[21.0, 2, 21, 8, 21], [1, 2, 4, 8, 16], [31, 31, 31, 31, 31]]
    assert summed_over_duplicates(ids, values).tolist() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_compiled_statistics_in_other_precisions(dtype: torch.dtype) -> None:
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (1e-4, 1e-5)
    logits, ids = inputs(9, dtype)
    wanted, wanted_grad = run(logits, ids, "torch", False)
    seen, grad = run(logits, ids, "compiled", False)
    for a, b in zip([*seen, grad], [*wanted, wanted_grad], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_compiled_divergence_equals_eager(name: str) -> None:
    logits, ids = inputs(9, torch.float64)
    teacher = inputs(10, torch.float64)[0][:9].roll(1, dims=1)
    grads: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    backends: tuple[Any, ...] = ("torch", "compiled")
    for backend in backends:
        leaf = logits.clone().requires_grad_()
        seen = dense_stats(
            leaf,
            teacher,
            ids[:, 0],
            make_divergence(ObjectiveConfig(divergence=name, alpha=0.7)),
            support_ids_TJ=ids[:, 1:],
            vocab_size=REAL,
            backend=backend,
        )
        (seen.divergence_T.sum() + probe_loss(seen.student)).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
        values.append(seen.divergence_T.detach())
    torch.testing.assert_close(values[1], values[0], rtol=1e-11, atol=1e-12)
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 1e-11
