"""Truncated sampling: the exact expected gradient over the kept tokens is that of the declared divergence on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from enumeration import VOCAB_SIZE, random_logprobs, relative_error, target_gradient
from textbook import F

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.errors import ConfigError
from opd_megatron.losses.batch_plan import BatchArrays, make_plan
from opd_megatron.losses.combinations import check_settings
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import (
    PlannedTokens,
    SupportInputs,
    TokenInputs,
    make_token_loss,
)
from opd_megatron.losses.token_stats import token_stats

OPEN = CorrectionConfig(kind="masked", low=0.0, high=math.inf)
NONE = CorrectionConfig(kind="none")
TEMPERATURE = 0.7


def kept_by(engine_V: torch.Tensor, top_p: float = 1.0, top_k: int = VOCAB_SIZE) -> torch.Tensor:
    """[V] bool: the likeliest tokens up to top_k whose predecessors hold at most top_p."""
    order = engine_V.argsort(descending=True)
    before = engine_V[order].exp().cumsum(0) - engine_V[order].exp()
    kept = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    kept[order[:top_k][before[:top_k] <= top_p]] = True
    return kept


def expected_gradient(
    settings: LossSettings,
    student_V: torch.Tensor,
    teacher_V: torch.Tensor,
    engine_V: torch.Tensor,
    kept_V: torch.Tensor,
    *,
    with_kept_mass: bool = True,
) -> torch.Tensor:
    """sum over kept y of mu(y) d loss(y) / d logits, mu the engine's distribution renormalised to `kept_V`."""
    tokens = kept_V.nonzero()[:, 0]
    log_mass = engine_V[kept_V].logsumexp(0)
    mu_T = (engine_V[tokens] - log_mass).exp()
    rows = len(tokens)
    logits = (student_V * TEMPERATURE).clone().requires_grad_()
    ids = torch.arange(3).expand(rows, 3) if settings.has_support else None
    stats = token_stats(
        logits.expand(rows, -1),
        tokens,
        support_ids_TJ=ids,
        vocab_size=VOCAB_SIZE,
        temperature=TEMPERATURE,
    )
    # As the plan makes it from what a server stated.
    arrays = BatchArrays(
        engine_V[tokens],
        teacher_V[tokens],
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
        torch.arange(rows),
        kept_logmass_N=log_mass.expand(rows) if with_kept_mass else None,
    )
    plan = make_plan(settings, arrays)
    support = None
    if ids is not None:
        support = SupportInputs(teacher_V[ids], torch.ones_like(ids, dtype=torch.bool))
    planned = PlannedTokens(scale_T=mu_T, kept_mass_T=plan.kept_mass_N)
    inputs = TokenInputs(
        engine_V[tokens], teacher_V[tokens], torch.ones(rows), support=support, planned=planned
    )
    made = make_token_loss(settings)(stats, inputs)
    made.loss_sum.backward()
    assert logits.grad is not None
    return logits.grad


def on_kept(
    name: str, kept_V: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """sum_S q f(pi/q) - f'(1) (pi - q), S held fixed."""
    slope = {"reverse_kl": 1.0, "forward_kl": -1.0}.get(name, 0.0)

    def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        p, q = log_p.exp()[kept_V], log_q.exp()[kept_V]
        return (F[name](p, q) - slope * (p - q)).sum()

    return divergence


def at_rollout_temperature(
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    student_V: torch.Tensor,
    teacher_V: torch.Tensor,
) -> torch.Tensor:
    """d divergence / d logits where the logits are divided by the rollout temperature."""
    return target_gradient(divergence, student_V, teacher_V) / TEMPERATURE


@pytest.mark.parametrize("correction", [NONE, OPEN], ids=["none", "open"])
@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 2}, {"top_p": 0.9, "top_k": 4}])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "squared_hellinger", "chi2"])
def test_sampled_tokens_descend_the_divergence_on_the_kept_ones(
    name: str, cut: dict[str, float], correction: CorrectionConfig
) -> None:
    student, teacher = random_logprobs(1), random_logprobs(101)
    # Without a correction the engines must agree, with one they need not.
    engine = student if correction is NONE else random_logprobs(201)
    kept = kept_by(engine, **cut)  # type: ignore[arg-type]
    assert 1 < int(kept.sum()) < VOCAB_SIZE
    settings = LossSettings(
        objective=ObjectiveConfig(divergence=name), correction=correction, truncated=True
    )
    seen = expected_gradient(settings, student, teacher, engine, kept)
    wanted = at_rollout_temperature(on_kept(name, kept), student, teacher)
    assert relative_error(seen, wanted) <= 1e-10
    blind = expected_gradient(settings, student, teacher, engine, kept, with_kept_mass=False)
    assert relative_error(blind, wanted) > 0.01


def test_student_equal_to_teacher_has_no_gradient_however_little_is_kept() -> None:
    student = random_logprobs(1)
    for top_k in range(1, VOCAB_SIZE + 1):
        kept = kept_by(student, top_k=top_k)
        seen = expected_gradient(
            LossSettings(correction=OPEN, truncated=True), student, student, student, kept
        )
        assert float(seen.abs().max()) < 1e-12


def test_bounds_act_on_the_disagreement_of_engines_and_not_on_the_kept_mass() -> None:
    student, teacher = random_logprobs(1, scale=0.3), random_logprobs(101)
    kept = kept_by(student, top_k=2)
    assert float(student[kept].exp().sum()) < 0.5  # below correction.low
    settings = LossSettings(truncated=True)
    assert settings.correction.low == 0.5
    seen = expected_gradient(settings, student, teacher, student, kept)
    wanted = at_rollout_temperature(on_kept("reverse_kl", kept), student, teacher)
    assert relative_error(seen, wanted) <= 1e-10


@pytest.mark.parametrize("correction", [NONE, OPEN], ids=["none", "open"])
def test_a_divergence_over_a_support_is_not_scaled_by_the_kept_mass(
    correction: CorrectionConfig,
) -> None:
    """Of the same student on both engines: a kept set holds another share of another engine."""
    student, teacher = random_logprobs(1), random_logprobs(101)
    objective = ObjectiveConfig(estimator="support_matching", topk=3, measure="renormalized")
    settings = LossSettings(objective=objective, correction=correction, truncated=True)
    seen = expected_gradient(settings, student, teacher, student, kept_by(student, top_p=0.8))

    def on_support(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        log_p, log_q = log_p[:3].log_softmax(-1), log_q[:3].log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    assert relative_error(seen, at_rollout_temperature(on_support, student, teacher)) <= 1e-10


def test_a_constant_reward_would_move_probability_into_the_kept_set() -> None:
    """Why a task reward and a discount are refused: over all tokens a constant has no gradient, over S it has."""
    student = random_logprobs(1)
    kept = kept_by(student, top_p=0.8)
    logits = student.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    (log_p.detach().exp() * log_p)[kept].sum().backward()
    assert logits.grad is not None
    into_kept = torch.autograd.functional.jacobian(
        lambda z: z.log_softmax(-1).exp()[kept].sum(), student
    )
    assert relative_error(logits.grad, into_kept) < 1e-10
    assert float(into_kept.norm()) > 0.01


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.discount=1", "correction.level=sequence"],
        ["task.coefficient=1", "correction.level=sequence"],
    ],
)
def test_later_costs_and_rewards_are_refused_with_truncation(overrides: list[str]) -> None:
    demo = load_recipe("demo")[0]
    truncated = apply_overrides(demo, [*overrides, "rollout.top_p=0.9", "rollout.top_k=32"])
    assert LossSettings.of(truncated).truncated
    check_settings(LossSettings.of(apply_overrides(demo, overrides)))
    with pytest.raises(ConfigError, match="pays for leaving the tokens that were kept"):
        check_settings(LossSettings.of(truncated))
    check_settings(
        LossSettings.of(
            dataclasses.replace(
                truncated, objective=dataclasses.replace(truncated.objective, allow_biased=True)
            )
        )
    )
