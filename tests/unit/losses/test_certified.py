"""Every objective of the catalog, on every support: its exact expected gradient is the declared one.

The composed loss of a recipe is run once for every token that the behavior policy could sample; the
gradients are weighted with their probabilities and compared, in float64, with autograd of the
target as a textbook writes it. Given responses, which nobody samples: test_cross_entropy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from enumeration import VOCAB_SIZE, random_logprobs, relative_error, target_gradient
from textbook import PARAMETERS, F, divergence_on_support, surrogate_target

from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.losses.catalog import OBJECTIVES, Objective
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.supports import Support, SupportSources, make_support
from opd_megatron.losses.token_loss import (
    PlannedTokens,
    SupportInputs,
    TokenInputs,
    make_token_loss,
)
from opd_megatron.losses.token_stats import token_stats

K = 3
CORRECTIONS = {
    "on_policy": CorrectionConfig(kind="none"),
    "masked": CorrectionConfig(kind="masked", low=0.0, high=math.inf),
    "truncated": CorrectionConfig(kind="truncated", low=0.0, high=math.inf),
}
Target = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CASES = [
    (row, support)
    for row in OBJECTIVES
    if not row.is_supervised
    for support in row.supports or ("sampled",)
]


def objective_of(row: Objective, support: str, **others: Any) -> ObjectiveConfig:
    named = {"support": support, "measure": row.measure} if row.measure else {}
    if row.token_weights:
        named["token_weights"] = row.token_weights
    return ObjectiveConfig(
        divergence=row.divergence,
        estimator=row.estimator,
        allow_biased=True,
        topk=K,
        **named,
        **PARAMETERS,
        **others,
    )


def support_at(name: str, student_V: torch.Tensor, teacher_V: torch.Tensor, token: int) -> Support:
    return make_support(
        name,
        SupportSources(
            vocab_size=VOCAB_SIZE,
            teacher_ids_TK=teacher_V.topk(K).indices[None],
            student_ids_TK=student_V.topk(K).indices[None],
            sampled_ids_T=torch.tensor([token]),
        ),
    )


def expected_gradient(
    settings: LossSettings,
    support_name: str,
    student_V: torch.Tensor,
    teacher_V: torch.Tensor,
    behavior_V: torch.Tensor,
) -> torch.Tensor:
    """sum_y mu(y) d loss(y) / d logits of the composed loss, [V]: one row for every y, scaled with mu(y)."""
    tokens = torch.arange(VOCAB_SIZE)
    support = ids = None
    if settings.has_support:
        made = [support_at(support_name, student_V, teacher_V, int(token)) for token in tokens]
        ids = torch.cat([one.ids_TJ for one in made])
        support = SupportInputs(teacher_V[ids], torch.cat([one.valid_TJ for one in made]))
    logits = student_V.detach().clone().requires_grad_()
    stats = token_stats(
        logits.expand(VOCAB_SIZE, -1), tokens, support_ids_TJ=ids, vocab_size=VOCAB_SIZE
    )
    inputs = TokenInputs(
        behavior_V,
        teacher_V,
        torch.ones(VOCAB_SIZE),
        support=support,
        planned=PlannedTokens(scale_T=behavior_V.exp()),
    )
    make_token_loss(settings)(stats, inputs).loss_sum.backward()
    assert logits.grad is not None
    return logits.grad


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def sampled_target(row: Objective) -> Target:
    """What a sampled-token row of the catalog says that it descends."""
    formula = F[row.divergence]
    if row.proven:
        return lambda log_p, log_q: formula(log_p.exp(), log_q.exp()).sum()
    if row.estimator == "k2_as_advantage":
        return lambda log_p, log_q: (
            log_p.exp() * (0.5 * (log_p - log_q) ** 2 - (log_p - log_q) + 1)
        ).sum()
    if row.estimator == "k3_as_advantage":
        return lambda log_p, log_q: kl(log_p, log_q) - kl(log_q, log_p)
    if row.estimator == "k3_differentiated":
        return lambda log_p, log_q: kl(log_q, log_p)
    assert row.estimator == "value_as_advantage"
    # D_g with r g'(r) = f(r): its derivative by log pi(v) is q(v) f(r(v)), here held constant.
    return lambda log_p, log_q: (formula(log_p.exp(), log_q.exp()).detach() * log_p).sum()


def target_of(
    row: Objective, support: str, student_V: torch.Tensor, teacher_V: torch.Tensor, token: int
) -> Target:
    if support == "sampled":
        return sampled_target(row)
    at = support_at(support, student_V, teacher_V, token)
    if row.estimator == "topk_surrogate":
        return lambda log_p, log_q: surrogate_target(
            log_p[None], log_q[None], at, row.measure, row.token_weights
        ).sum()
    return lambda log_p, log_q: divergence_on_support(
        row.divergence, log_p[None], log_q[None], at, row.measure
    ).sum()


def declared_gradient(
    row: Objective,
    support: str,
    student_V: torch.Tensor,
    teacher_V: torch.Tensor,
    tokens_V: torch.Tensor,
) -> torch.Tensor:
    """The target's gradient; a support with the sampled token is averaged over it, as `tokens_V` weighs."""
    if support != "teacher_topk_plus_sampled":
        return target_gradient(
            target_of(row, support, student_V, teacher_V, 0), student_V, teacher_V
        )
    each = [
        target_gradient(target_of(row, support, student_V, teacher_V, t), student_V, teacher_V)
        for t in range(VOCAB_SIZE)
    ]
    return sum(
        (w * g for w, g in zip(tokens_V.exp(), each, strict=True)),
        torch.zeros(VOCAB_SIZE, dtype=torch.float64),
    )


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("row", "support"), CASES, ids=lambda x: getattr(x, "name", x))
def test_expected_gradient_is_the_declared_one(
    row: Objective, support: str, correction: str
) -> None:
    objective = objective_of(row, support)
    settings = LossSettings(objective=objective, correction=CORRECTIONS[correction])
    student, teacher = random_logprobs(1), random_logprobs(101)
    behavior = student if correction == "on_policy" else random_logprobs(201)
    seen = expected_gradient(settings, support, student, teacher, behavior)
    # Weighted with pi / mu, what mu sampled counts as if pi had.
    wanted = declared_gradient(row, support, student, teacher, student)
    if float(wanted.norm()) < 1e-12:  # an empty support (intersection) has nothing to descend
        assert float(seen.norm()) < 1e-12
    else:
        assert relative_error(seen, wanted) <= 1e-10


@pytest.mark.parametrize("row", [r for r in OBJECTIVES if not r.proven], ids=lambda r: r.name)
def test_what_is_declared_biased_really_is(row: Objective) -> None:
    """Its gradient is not that of the divergence in its name, on the same tokens."""
    support = "teacher_topk" if row.supports else "sampled"
    student, teacher = random_logprobs(0), random_logprobs(100)
    settings = LossSettings(
        objective=objective_of(row, support), correction=CORRECTIONS["on_policy"]
    )
    seen = expected_gradient(settings, support, student, teacher, student)
    # The raw measure of the two divergences with a slope at pi = q; `generalized` takes it away.
    measure = {"raw": "generalized"}.get(row.measure, row.measure)
    named = next(
        r
        for r in OBJECTIVES
        if r.divergence == row.divergence
        and r.estimator == ("support_matching" if row.supports else "policy_gradient")
        and r.measure == measure
    )
    wanted = declared_gradient(named, support, student, teacher, student)
    assert relative_error(seen, wanted) > 0.05


def test_a_coefficient_scales_the_gradient_and_an_entropy_bonus_adds_its_own() -> None:
    student, teacher, behavior = (random_logprobs(s) for s in (0, 100, 200))
    entropy = target_gradient(lambda p, _: (p.exp() * p).sum(), student, teacher)
    for row, support in CASES[:1] + [c for c in CASES if c[1] == "union"][:1]:
        plain = LossSettings(objective=objective_of(row, support), correction=CORRECTIONS["masked"])
        more = replace(
            plain, objective=replace(plain.objective, coefficient=2.5, entropy_bonus=0.3)
        )
        base = expected_gradient(plain, support, student, teacher, behavior)
        seen = expected_gradient(more, support, student, teacher, behavior)
        assert relative_error(seen, 2.5 * base + 0.3 * entropy) <= 1e-10
