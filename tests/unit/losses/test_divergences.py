"""Every divergence: its formulas agree with each other and with textbook values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from enumeration import random_logprobs

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.losses.divergences import DIVERGENCES, Divergence, make_divergence

PARAMETERS = {
    "jsd": [{"jsd_teacher_weight": w} for w in (0.1, 0.5, 0.9)],
    "alpha": [{"alpha": a} for a in (0.25, 0.5, 1.5, 2.0)],
    "tsallis": [{"alpha": a} for a in (0.5, 2.0)],
}
CASES = [
    replace(ObjectiveConfig(divergence=name), **parameters)  # type: ignore[arg-type]
    for name in DIVERGENCES
    for parameters in PARAMETERS.get(name, [{}])
]
LOG_R = torch.linspace(-4, 4, 41, dtype=torch.float64)[1::2]  # r = 1 is not among them


def case_id(objective: ObjectiveConfig) -> str:
    return f"{objective.divergence}-{objective.jsd_teacher_weight}-{objective.alpha}"


@pytest.fixture(params=CASES, ids=case_id)
def divergence(request: pytest.FixtureRequest) -> Divergence:
    return make_divergence(request.param)


def total(divergence: Divergence, log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    return float(divergence.terms(log_p, log_q).sum())


def test_derivative_is_that_of_f(divergence: Divergence) -> None:
    log_r = LOG_R.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence.f(log_r).sum(), log_r)
    derivative = slope / LOG_R.exp() - divergence.slope_at_one
    torch.testing.assert_close(divergence.derivative(LOG_R), derivative, rtol=1e-11, atol=1e-12)


def test_f_and_its_centered_derivative_are_zero_at_one(divergence: Divergence) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(divergence.f(zero)) == pytest.approx(0.0, abs=1e-15)
    assert float(divergence.derivative(zero)) == pytest.approx(0.0, abs=1e-15)


def test_f_is_convex(divergence: Divergence) -> None:
    slopes = divergence.derivative(LOG_R)
    assert bool((slopes[1:] >= slopes[:-1]).all())


def test_terms_are_q_times_f(divergence: Divergence) -> None:
    log_p, log_q = random_logprobs(1), random_logprobs(2)
    expected = log_q.exp() * divergence.f(log_p - log_q)
    torch.testing.assert_close(divergence.terms(log_p, log_q), expected, rtol=1e-11, atol=1e-14)


def test_it_is_positive_and_zero_only_for_equal_distributions(divergence: Divergence) -> None:
    for seed in range(5):
        log_p, log_q = random_logprobs(seed), random_logprobs(seed + 50)
        assert total(divergence, log_p, log_q) > 1e-3
        assert total(divergence, log_p, log_p) == pytest.approx(0.0, abs=1e-14)


def test_terms_without_the_slope_are_never_negative(divergence: Divergence) -> None:
    log_p, log_q = random_logprobs(3) - 0.4, random_logprobs(4) + 0.3  # unequal masses
    terms = divergence.terms(log_p, log_q)
    terms = terms - divergence.slope_at_one * (log_p.exp() - log_q.exp())
    assert bool((terms >= 0).all())


def test_extreme_ratios_stay_finite_in_float32(divergence: Divergence) -> None:
    log_r = torch.tensor([-60.0, 60.0])
    assert bool(torch.isfinite(divergence.derivative(log_r)).all())
    log_p = torch.tensor([-1e-6, -1000.0, -3.0], requires_grad=True)
    log_q = torch.tensor([-60.0, -2.0, -63.0])
    (gradient,) = torch.autograd.grad(divergence.terms(log_p, log_q).sum(), log_p)
    assert bool(torch.isfinite(gradient).all())


def test_known_values() -> None:
    log_p, log_q = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.5, 0.5], [0.25, 0.75]))
    wanted = {
        "reverse_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "forward_kl": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        "squared_hellinger": 1 - math.sqrt(0.125) - math.sqrt(0.375),
        "chi2": 0.0625 / 0.25 + 0.0625 / 0.75,
        "total_variation": 0.25,
    }
    for name, value in wanted.items():
        seen = total(make_divergence(ObjectiveConfig(divergence=name)), log_p, log_q)
        assert seen == pytest.approx(value), name


def test_jsd_mixes_probabilities_and_points_the_right_way() -> None:
    log_p, log_q = random_logprobs(1), random_logprobs(2)
    p, q, w = log_p.exp(), log_q.exp(), 0.3
    m = w * q + (1 - w) * p
    wanted = w * (q * (q / m).log()).sum() + (1 - w) * (p * (p / m).log()).sum()
    objective = ObjectiveConfig(divergence="jsd", jsd_teacher_weight=w)
    assert total(make_divergence(objective), log_p, log_q) == pytest.approx(float(wanted))


@pytest.mark.parametrize(("weight", "limit"), [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")])
def test_jsd_divided_by_the_small_weight_tends_to_the_kl(weight: float, limit: str) -> None:
    log_p, log_q = random_logprobs(1), random_logprobs(2)
    objective = ObjectiveConfig(divergence="jsd", jsd_teacher_weight=weight)
    seen = total(make_divergence(objective), log_p, log_q) / min(weight, 1 - weight)
    wanted = total(make_divergence(ObjectiveConfig(divergence=limit)), log_p, log_q)
    assert seen == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("order", "limit", "factor"),
    [
        (1 + 1e-7, "reverse_kl", 1.0),
        (1e-7, "forward_kl", 1.0),
        (0.5, "squared_hellinger", 4.0),
        (2.0, "chi2", 0.5),
    ],
)
def test_the_alpha_family_contains_the_others(order: float, limit: str, factor: float) -> None:
    log_p, log_q = random_logprobs(1), random_logprobs(2)
    seen = total(make_divergence(ObjectiveConfig(divergence="alpha", alpha=order)), log_p, log_q)
    wanted = total(make_divergence(ObjectiveConfig(divergence=limit)), log_p, log_q)
    assert seen == pytest.approx(factor * wanted, rel=1e-5)


def test_tsallis_is_alpha_times_its_order() -> None:
    log_p, log_q = random_logprobs(1), random_logprobs(2)
    a, b = (
        total(make_divergence(ObjectiveConfig(divergence=n, alpha=0.7)), log_p, log_q)
        for n in ("tsallis", "alpha")
    )
    assert a == pytest.approx(0.7 * b)
