"""Every objective of the catalog: its exact expected gradient is the one the catalog declares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from enumeration import expected_gradient, random_logprobs, relative_error, target_gradient

from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.errors import ConfigError
from opd_megatron.losses.catalog import OBJECTIVES, Objective, check_objective
from opd_megatron.losses.divergences import DIVERGENCES, make_divergence
from opd_megatron.losses.estimators import ESTIMATORS
from opd_megatron.losses.token_loss import make_token_loss

Target = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NONE = CorrectionConfig(kind="none")
OPEN = CorrectionConfig(kind="masked", low=0.0, high=math.inf)
PARAMETERS = [{"jsd_teacher_weight": 0.5, "alpha": 0.5}, {"jsd_teacher_weight": 0.2, "alpha": 1.7}]


def config_of(row: Objective, parameters: dict[str, float] | None = None) -> ObjectiveConfig:
    made = ObjectiveConfig(divergence=row.divergence, estimator=row.estimator, allow_biased=True)
    return replace(made, **(parameters or {}))  # type: ignore[arg-type]


def divergence_of(objective: ObjectiveConfig) -> Target:
    divergence = make_divergence(objective)
    return lambda log_p, log_q: divergence.terms(log_p, log_q).sum()


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def declared_target(row: Objective, objective: ObjectiveConfig) -> Target:
    """What the catalog says is descended, written out independently of the estimators."""
    if row.proven:
        return divergence_of(objective)
    if row.estimator == "k2_as_advantage":

        def k2(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
            log_r = log_p - log_q
            return (log_p.exp() * (0.5 * log_r.square() - log_r + 1)).sum()

        return k2
    if row.estimator == "k3_as_advantage":
        return lambda log_p, log_q: kl(log_p, log_q) - kl(log_q, log_p)
    if row.estimator == "k3_differentiated":
        return lambda log_p, log_q: kl(log_q, log_p)
    assert row.estimator == "value_as_advantage"
    divergence = make_divergence(objective)

    def with_derivative_f_over_r(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        # D_g with r g'(r) = f(r): its derivative by log pi(v) is q(v) f(r(v)), here held constant.
        return (divergence.terms(log_p, log_q).detach() * log_p).sum()

    return with_derivative_f_over_r


@pytest.mark.parametrize("parameters", PARAMETERS, ids=["symmetric", "skewed"])
@pytest.mark.parametrize("row", OBJECTIVES, ids=lambda row: row.name)
def test_expected_gradient_is_the_declared_one(
    row: Objective, parameters: dict[str, float]
) -> None:
    objective = config_of(row, parameters)
    for seed in range(3):
        student, teacher = random_logprobs(seed), random_logprobs(seed + 100)
        wanted = target_gradient(declared_target(row, objective), student, teacher)
        on_policy = expected_gradient(make_token_loss(objective, NONE), student, teacher, student)
        assert relative_error(on_policy, wanted) <= 1e-10
        behavior = random_logprobs(seed + 200)
        reweighted = expected_gradient(make_token_loss(objective, OPEN), student, teacher, behavior)
        assert relative_error(reweighted, wanted) <= 1e-10


@pytest.mark.parametrize(
    "row", [row for row in OBJECTIVES if not row.proven], ids=lambda row: row.name
)
def test_what_is_declared_biased_really_is(row: Objective) -> None:
    objective = config_of(row)
    student, teacher = random_logprobs(0), random_logprobs(100)
    seen = expected_gradient(make_token_loss(objective, NONE), student, teacher, student)
    wanted = target_gradient(divergence_of(objective), student, teacher)
    assert relative_error(seen, wanted) > 0.05


@pytest.mark.parametrize("row", OBJECTIVES, ids=lambda row: row.name)
def test_biased_objectives_need_permission(row: Objective) -> None:
    objective = replace(config_of(row), allow_biased=False)
    if row.proven:
        assert check_objective(objective) is row
    else:
        with pytest.raises(ConfigError, match="allow_biased") as caught:
            make_token_loss(objective, NONE)
        assert row.descends in str(caught.value)


def test_the_catalog_holds_everything_that_is_registered() -> None:
    assert {row.divergence for row in OBJECTIVES} == set(DIVERGENCES)
    assert {row.estimator for row in OBJECTIVES} == set(ESTIMATORS)
    assert {row.divergence for row in OBJECTIVES if row.proven} == set(DIVERGENCES)
    fields = ObjectiveConfig.__dataclass_fields__
    assert set(fields["divergence"].metadata["choices"]) == set(DIVERGENCES)
    assert set(fields["estimator"].metadata["choices"]) == set(ESTIMATORS)


def test_advantages_vanish_where_student_and_teacher_agree() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    for row in OBJECTIVES:
        advantage = ESTIMATORS.get(row.estimator)(make_divergence(config_of(row)))
        assert float(advantage(zero).abs().max()) < 1e-15, row.name


def test_entropy_bonus_adds_the_exact_entropy_gradient() -> None:
    student, teacher, behavior = (random_logprobs(s) for s in (0, 100, 200))

    def target(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return kl(log_p, log_q) + 0.3 * (log_p.exp() * log_p).sum()

    loss = make_token_loss(ObjectiveConfig(entropy_bonus=0.3), OPEN)
    seen = expected_gradient(loss, student, teacher, behavior)
    assert relative_error(seen, target_gradient(target, student, teacher)) <= 1e-10


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (ObjectiveConfig(divergence="revers_kl"), "did you mean 'reverse_kl'"),
        (ObjectiveConfig(estimator="k1"), "no such estimator"),
        (ObjectiveConfig(divergence="chi2", estimator="k2_as_advantage"), "not for chi2"),
        (ObjectiveConfig(divergence="jsd", jsd_teacher_weight=0.0), "strictly between"),
        (ObjectiveConfig(divergence="jsd", jsd_teacher_weight=1.0), "strictly between"),
        (ObjectiveConfig(divergence="alpha", alpha=1.0), "reverse_kl for 1"),
        (ObjectiveConfig(divergence="tsallis", alpha=0.0), "forward_kl for 0"),
        (ObjectiveConfig(discount=0.5), "objective.discount=0.5"),
        (ObjectiveConfig(entropy_bonus=-1.0), "objective.entropy_bonus=-1.0"),
    ],
)
def test_impossible_objectives_are_refused(objective: ObjectiveConfig, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_objective(objective)
    assert words in str(caught.value)
