"""Mutants of the objective: known defects of other code, each caught by a check that ours passes.

Every case runs one check twice: on this package, where it must pass, and on the mutant, where it
must fail. A check that a mutant survives proves nothing, so it fails here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from enumeration import (
    VOCAB_SIZE,
    loss_of,
    random_logprobs,
    relative_error,
    reverse_kl,
    target_gradient,
)

from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.support_matching import support_divergence, surrogate
from opd_megatron.losses.supports import SupportSources, make_support
from opd_megatron.losses.token_loss import TokenInputs
from opd_megatron.losses.token_stats import token_stats

STUDENT, TEACHER, BEHAVIOR = (random_logprobs(seed) for seed in (0, 100, 200))
OPEN = CorrectionConfig(kind="masked", low=0.0, high=math.inf)
# (logits [V], sampled token, teacher log-probs [V], behavior log-probs [V]) -> loss of that token
SampledLoss = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], torch.Tensor]
# (logits [V], teacher log-probs [V]) -> loss of a position
PositionLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def expected(loss: SampledLoss, behavior: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    for token in range(VOCAB_SIZE):
        logits = STUDENT.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits, token, TEACHER, behavior), logits)
        total += behavior[token].exp() * grad
    return total


def ours(objective: ObjectiveConfig) -> SampledLoss:
    loss = loss_of(objective, OPEN)

    def of_token(
        logits: torch.Tensor, token: int, teacher: torch.Tensor, behavior: torch.Tensor
    ) -> torch.Tensor:
        stats = token_stats(logits[None], torch.tensor([token]), vocab_size=VOCAB_SIZE)
        one = slice(token, token + 1)
        return loss(stats, TokenInputs(behavior[one], teacher[one], torch.ones(1))).loss_sum

    return of_token


def parts(
    logits: torch.Tensor, token: int, teacher: torch.Tensor, behavior: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log pi(y) with gradient, l = log(pi/q)(y) with gradient, importance weight without."""
    logp = logits.log_softmax(-1)[token]
    return logp, logp - teacher[token], (logp - behavior[token]).exp().detach()


def k1_differentiated(z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    _, log_r, weight = parts(z, y, q, mu)
    return weight * log_r


def k3_differentiated(z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    _, log_r, weight = parts(z, y, q, mu)
    return weight * ((-log_r).exp() - 1 + log_r)


def k3_as_advantage(z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    logp, log_r, weight = parts(z, y, q, mu)
    return weight * ((-log_r).exp() - 1 + log_r).detach() * logp


def k2_as_advantage(z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    logp, log_r, weight = parts(z, y, q, mu)
    return weight * (0.5 * log_r.square()).detach() * logp


def k1_clamped_at_zero(z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    logp, log_r, weight = parts(z, y, q, mu)
    return weight * log_r.detach().clamp_min(0.0) * logp


def advantage_with_gradient(
    z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor
) -> torch.Tensor:
    logp, log_r, weight = parts(z, y, q, mu)
    return weight * log_r * logp


def sign_flipped(z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    logp, log_r, weight = parts(z, y, q, mu)
    return -weight * log_r.detach() * logp


def no_importance_weight(
    z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor
) -> torch.Tensor:
    logp, log_r, _ = parts(z, y, q, mu)
    return log_r.detach() * logp


def inverse_importance_weight(
    z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor
) -> torch.Tensor:
    logp, log_r, weight = parts(z, y, q, mu)
    return log_r.detach() * logp / weight


def importance_weight_with_gradient(
    z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor
) -> torch.Tensor:
    logp, log_r, _ = parts(z, y, q, mu)
    return (logp - mu[y]).exp() * log_r.detach() * logp


def advantage_from_behavior_logprobs(
    z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor
) -> torch.Tensor:
    logp, _, weight = parts(z, y, q, mu)
    return weight * (mu[y] - q[y]) * logp


def support_kl_as_scalar_advantage(
    z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor
) -> torch.Tensor:
    logp, _, weight = parts(z, y, q, mu)
    return weight * reverse_kl(z.log_softmax(-1), q).detach() * logp


@pytest.mark.parametrize(
    "mutant",
    [
        k1_differentiated,
        k3_differentiated,
        k3_as_advantage,
        k2_as_advantage,
        k1_clamped_at_zero,
        advantage_with_gradient,
        sign_flipped,
        no_importance_weight,
        inverse_importance_weight,
        importance_weight_with_gradient,
        advantage_from_behavior_logprobs,
        support_kl_as_scalar_advantage,
    ],
)
def test_sampled_mutants_of_the_reverse_kl_are_caught(mutant: SampledLoss) -> None:
    wanted = target_gradient(reverse_kl, STUDENT, TEACHER)
    assert relative_error(expected(ours(ObjectiveConfig()), BEHAVIOR), wanted) <= 1e-10
    assert relative_error(expected(mutant, BEHAVIOR), wanted) > 0.01


def test_two_peer_defects_have_no_gradient_at_all() -> None:
    for mutant in (k1_differentiated, support_kl_as_scalar_advantage):
        assert float(expected(mutant, STUDENT).abs().max()) < 1e-15


def jsd_objective(weight: float) -> ObjectiveConfig:
    return ObjectiveConfig(divergence="jsd", jsd_teacher_weight=weight)


def jsd_target(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p, q = log_p.exp(), log_q.exp()
    m = 0.2 * q + 0.8 * p
    return (0.2 * q * (q / m).log() + 0.8 * p * (p / m).log()).sum()


def jsd_in_log_space(z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    logp, _, weight = parts(z, y, q, mu)
    log_mixture = 0.2 * q[y] + 0.8 * logp.detach()
    return weight * 0.8 * (logp.detach() - log_mixture) * logp


def jsd_with_weight_reversed(
    z: torch.Tensor, y: int, q: torch.Tensor, mu: torch.Tensor
) -> torch.Tensor:
    return ours(jsd_objective(0.8))(z, y, q, mu)


@pytest.mark.parametrize("mutant", [jsd_in_log_space, jsd_with_weight_reversed])
def test_sampled_mutants_of_the_jsd_are_caught(mutant: SampledLoss) -> None:
    wanted = target_gradient(jsd_target, STUDENT, TEACHER)
    assert relative_error(expected(ours(jsd_objective(0.2)), BEHAVIOR), wanted) <= 1e-10
    assert relative_error(expected(mutant, BEHAVIOR), wanted) > 0.01


@dataclass(frozen=True)
class SupportCase:
    """`target` is written out by hand over the teacher's top 3; `ours` must have its gradient."""

    ours: PositionLoss
    target: PositionLoss
    mutant: PositionLoss


SUPPORT = make_support(
    "teacher_topk",
    SupportSources(vocab_size=VOCAB_SIZE, teacher_ids_TK=TEACHER.topk(3).indices[None]),
)
TOP = SUPPORT.ids_TJ[0]


def through_stats(loss: Callable[..., torch.Tensor]) -> PositionLoss:
    def of_position(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        stats = token_stats(
            logits[None], TOP[:1], support_ids_TJ=SUPPORT.ids_TJ, vocab_size=VOCAB_SIZE
        )
        return loss(stats.support_logprobs_TJ, teacher[SUPPORT.ids_TJ], SUPPORT.valid_TJ).sum()

    return of_position


def matching(name: str, normalization: str) -> PositionLoss:
    divergence = make_divergence(ObjectiveConfig(divergence=name))
    return through_stats(lambda s, q, v: support_divergence(divergence, s, q, v, normalization))


def pair(z: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of student and teacher on the support."""
    return z.log_softmax(-1)[TOP].exp(), q[TOP].exp()


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a / b).log()).sum()


def renormalized_reverse_kl(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, t = pair(z, q)
    return kl(p / p.sum(), t / t.sum())


def only_the_teacher_renormalized(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, t = pair(z, q)
    return kl(p, t / t.sum())


def with_tail(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, 1 - x.sum()[None]])


def tail_bucket_reverse_kl(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, t = pair(z, q)
    return kl(with_tail(p), with_tail(t))


def tail_of_the_teacher_only(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, t = pair(z, q)
    return kl(with_tail(p.detach())[-1:], with_tail(t)[-1:]) + kl(p, t)


def raw_forward_kl(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, t = pair(z, q)
    return kl(t, p)


def truncated_forward_kl_clamped_at_zero(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return raw_forward_kl(z, q).clamp_min(0.0)


def direction_swapped(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, t = pair(z, q)
    return kl(p, t)


def surrogate_target(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, t = pair(z, q)
    return (p * (p / t).log() - p + t).sum()


def surrogate_summed_before_multiplying(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The K dimension lost: one number for the position, multiplied with the sampled log-prob."""
    p, t = pair(z, q)
    return (p * (p / t).log()).sum().detach() * z.log_softmax(-1)[TOP[0]]


def heavy_student() -> torch.Tensor:
    """A student with more mass on the teacher's top 3 than the teacher: its raw forward KL is below
    0.
    """
    logits = TEACHER.clone()
    logits[TOP] += torch.tensor([2.5, 1.5, 2.0], dtype=torch.float64)
    return logits


@pytest.mark.parametrize(
    "case",
    [
        SupportCase(
            matching("reverse_kl", "renormalized"),
            renormalized_reverse_kl,
            only_the_teacher_renormalized,
        ),
        SupportCase(
            matching("reverse_kl", "tail_bucket"), tail_bucket_reverse_kl, tail_of_the_teacher_only
        ),
        SupportCase(
            matching("forward_kl", "raw"), raw_forward_kl, truncated_forward_kl_clamped_at_zero
        ),
        SupportCase(matching("forward_kl", "raw"), raw_forward_kl, direction_swapped),
        SupportCase(
            through_stats(lambda s, q, v: surrogate(s, q, v, "raw", "student_p")),
            surrogate_target,
            surrogate_summed_before_multiplying,
        ),
    ],
    ids=lambda case: case.mutant.__name__,
)
def test_mutants_of_support_matching_are_caught(case: SupportCase) -> None:
    def gradient(loss: PositionLoss) -> torch.Tensor:
        logits = heavy_student().requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits, TEACHER), logits)
        return grad

    wanted = gradient(case.target)
    assert relative_error(gradient(case.ours), wanted) <= 1e-10
    assert relative_error(gradient(case.mutant), wanted) > 0.01
