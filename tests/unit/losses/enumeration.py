"""Exact expectations over a small vocabulary: what a sampled loss does on average.

The student at one position is a row of logits; every token that could be sampled is a row of a
batch, and the gradient of each is weighted with its probability under the behavior policy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import (
    TokenInputs,
    TokenLoss,
    TokenLossOutput,
    make_token_loss,
)
from opd_megatron.losses.token_stats import TokenStats, token_stats

VOCAB_SIZE = 6
LossOf = Callable[[TokenStats, TokenInputs], TokenLossOutput]


def loss_of(
    objective: ObjectiveConfig, correction: CorrectionConfig, *, allow_nan: bool = False
) -> TokenLoss:
    """The loss of an objective under a correction, nothing else set."""
    return make_token_loss(
        LossSettings(objective=objective, correction=correction), allow_nan=allow_nan
    )


def random_logprobs(seed: int, scale: float = 1.5) -> torch.Tensor:
    """[V] float64 log-probs of a random categorical distribution."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB_SIZE, generator=generator, dtype=torch.float64) * scale
    return logits.log_softmax(-1)


def expected_gradient(
    loss: LossOf,
    student_logits_V: torch.Tensor,
    teacher_logprobs_V: torch.Tensor,
    behavior_logprobs_V: torch.Tensor,
) -> torch.Tensor:
    """sum_y mu(y) d loss(y) / d logits, [V] float64."""
    total = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    for token in range(VOCAB_SIZE):
        logits = student_logits_V.detach().clone().requires_grad_()
        stats = token_stats(logits[None, :], torch.tensor([token]), vocab_size=VOCAB_SIZE)
        inputs = TokenInputs(
            behavior_logprobs_T=behavior_logprobs_V[token : token + 1],
            teacher_logprobs_T=teacher_logprobs_V[token : token + 1],
            mask_T=torch.ones(1, dtype=torch.bool),
        )
        loss(stats, inputs).loss_sum.backward()
        assert logits.grad is not None
        total += behavior_logprobs_V[token].exp() * logits.grad
    return total


def target_gradient(
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    student_logits_V: torch.Tensor,
    teacher_logprobs_V: torch.Tensor,
) -> torch.Tensor:
    """d divergence(log pi, log q) / d logits by autograd, [V] float64."""
    logits = student_logits_V.detach().clone().requires_grad_()
    divergence(logits.log_softmax(-1), teacher_logprobs_V).backward()
    assert logits.grad is not None
    return logits.grad


def relative_error(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of `wanted`."""
    return float((seen - wanted).norm() / wanted.norm())


def reverse_kl(student_logprobs_V: torch.Tensor, teacher_logprobs_V: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher)."""
    return (student_logprobs_V.exp() * (student_logprobs_V - teacher_logprobs_V)).sum()
