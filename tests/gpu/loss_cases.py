"""Inputs of the GPU tests, the losses that use every output, and comparison with float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from opd_megatron.losses.token_stats import TokenStats


class HandedOver(torch.autograd.Function):
    """The same memory as the output of an operation, as a model hands its logits over."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]


@dataclass(frozen=True)
class Case:
    """A batch of logits; ids never name the columns that `impossible` sets to -inf."""

    num_tokens: int
    num_columns: int
    vocab_size: int
    num_ids: int
    dtype: torch.dtype
    impossible: bool = False
    temperature: float = 0.8

    def inputs(self, device: torch.device, seed: int = 5) -> tuple[torch.Tensor, ...]:
        """Logits [T, V], targets [T] and support [T, J] with duplicates."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_tokens, self.num_columns)
        logits = (torch.randn(shape, generator=generator) * 4).to(self.dtype)
        ids = torch.randint(
            0, self.vocab_size, (self.num_tokens, 1 + self.num_ids), generator=generator
        )
        if self.num_ids > 1 and self.num_tokens:
            ids[:, -1] = ids[:, 1]
            ids[0, 1:] = ids[0, 0]
        if self.impossible:
            logits[:, :2] = -math.inf
            ids.clamp_min_(2)
        logits[:, self.vocab_size :] = 50.0  # padding that would own all the probability
        return logits.to(device), ids[:, 0].to(device), ids[:, 1:].to(device)


def probe_loss(stats: TokenStats, seed: int = 3) -> torch.Tensor:
    """Couples tokens and uses every output with its own random coefficient."""
    generator = torch.Generator().manual_seed(seed)

    def random(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    loss = (stats.log_z_T * random(stats.log_z_T)).sum()
    loss = loss + (stats.entropy_T * random(stats.entropy_T)).sum()
    loss = loss + (stats.sampled_logprobs_T * random(stats.sampled_logprobs_T)).sum()
    if stats.support_logprobs_TJ is not None:
        loss = loss + (stats.support_logprobs_TJ * random(stats.support_logprobs_TJ)).sum()
    return loss


def outputs(stats: TokenStats) -> list[torch.Tensor]:
    assert stats.support_logprobs_TJ is not None
    return [stats.log_z_T, stats.entropy_T, stats.sampled_logprobs_T, stats.support_logprobs_TJ]


def assert_same_outputs(seen: TokenStats, wanted: TokenStats, tolerance: float = 1e-5) -> None:
    for a, b in zip(outputs(seen), outputs(wanted), strict=True):
        torch.testing.assert_close(a.double().cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


def assert_same_gradient(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within one unit in the last place of 16-bit numbers, or float32 rounding of the statistics."""
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[seen.dtype]
    torch.testing.assert_close(seen.double().cpu(), wanted.cpu(), rtol=unit, atol=1e-5)
