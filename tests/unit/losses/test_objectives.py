"""What a recipe may ask for: everything in the catalog, nothing biased without permission."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_megatron.config.schema import (
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.errors import ConfigError
from opd_megatron.losses.catalog import OBJECTIVES, Objective, find_objective
from opd_megatron.losses.combinations import check_in_process, check_served, check_settings
from opd_megatron.losses.divergences import DIVERGENCES, make_divergence
from opd_megatron.losses.estimators import ESTIMATORS
from opd_megatron.losses.settings import SUPPORT_ESTIMATORS, LossSettings
from opd_megatron.losses.support_matching import NORMALIZATIONS, TOKEN_WEIGHTS
from opd_megatron.losses.supports import SUPPORTS
from opd_megatron.losses.token_loss import make_token_loss

TASK = TaskConfig(coefficient=1.0)


def config_of(row: Objective) -> ObjectiveConfig:
    named = {k: getattr(row, k) for k in ("measure", "token_weights") if getattr(row, k)}
    return ObjectiveConfig(divergence=row.divergence, estimator=row.estimator, **named)


def correction_of(row: Objective) -> CorrectionConfig:
    """Given responses have no behavior policy to correct for."""
    return CorrectionConfig(kind="none") if row.is_supervised else CorrectionConfig()


@pytest.mark.parametrize("row", OBJECTIVES, ids=lambda row: row.name)
def test_biased_objectives_need_permission(row: Objective) -> None:
    objective = config_of(row)
    assert find_objective(objective) is row
    if row.proven:
        settings = LossSettings(objective=objective, correction=correction_of(row))
        assert check_settings(settings) is row
        return
    with pytest.raises(ConfigError, match="allow_biased") as caught:
        make_token_loss(LossSettings(objective=objective))
    assert row.descends in str(caught.value)
    make_token_loss(LossSettings(objective=replace(objective, allow_biased=True)))


def test_the_catalog_holds_everything_that_is_registered() -> None:
    estimators = {*ESTIMATORS, *SUPPORT_ESTIMATORS}
    assert {row.divergence for row in OBJECTIVES} == set(DIVERGENCES)
    assert {row.estimator for row in OBJECTIVES} == estimators
    assert {row.divergence for row in OBJECTIVES if row.proven} == set(DIVERGENCES)
    assert {row.measure for row in OBJECTIVES if row.measure} == set(NORMALIZATIONS)
    assert {row.token_weights for row in OBJECTIVES if row.token_weights} == set(TOKEN_WEIGHTS)
    fields = ObjectiveConfig.__dataclass_fields__
    assert set(fields["divergence"].metadata["choices"]) == set(DIVERGENCES)
    assert set(fields["estimator"].metadata["choices"]) == estimators
    assert set(fields["support"].metadata["choices"]) == set(SUPPORTS)
    assert set(fields["measure"].metadata["choices"]) == set(NORMALIZATIONS)
    assert set(fields["token_weights"].metadata["choices"]) == set(TOKEN_WEIGHTS)


def test_advantages_vanish_where_student_and_teacher_agree() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    for row in OBJECTIVES:
        if row.estimator in ESTIMATORS and not row.is_supervised:
            advantage = ESTIMATORS.get(row.estimator)(make_divergence(config_of(row)))
            assert float(advantage(zero).abs().max()) < 1e-15, row.name


def objective(**fields: object) -> LossSettings:
    return LossSettings(objective=ObjectiveConfig(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (objective(divergence="revers_kl"), "did you mean 'reverse_kl'"),
        (objective(estimator="k1"), "no such estimator"),
        (objective(divergence="chi2", estimator="k2_as_advantage"), "not for chi2"),
        (objective(divergence="chi2", estimator="topk_surrogate"), "not for chi2"),
        (objective(estimator="topk_surrogate", measure="tail_bucket"), "renormalized or raw"),
        (objective(divergence="jsd", jsd_teacher_weight=0.0), "strictly between"),
        (objective(divergence="jsd", jsd_teacher_weight=1.0), "strictly between"),
        (objective(divergence="alpha", alpha=1.0), "reverse_kl for 1"),
        (objective(divergence="tsallis", alpha=0.0), "forward_kl for 0"),
        (objective(discount=1.5), "objective.discount=1.5"),
        (objective(discount=0.5, estimator="k2_differentiated"), "objective.discount=0.5"),
        (objective(entropy_bonus=-1.0), "objective.entropy_bonus=-1.0"),
        (objective(coefficient=0.0), "nothing is left to learn"),
        (objective(normalization="mean_of_means"), "objective.normalization='mean_of_means'"),
        (LossSettings(correction=CorrectionConfig(low=2.0, high=0.5)), "order the bounds"),
        (LossSettings(correction=CorrectionConfig(low=-1.0)), "correction.low=-1.0"),
        (LossSettings(correction=CorrectionConfig(kind="x")), "correction.kind='x'"),
        (LossSettings(correction=CorrectionConfig(level="batch")), "correction.level='batch'"),
        (
            LossSettings(filter=FilterConfig(score="student_entropy", low=70, high=30)),
            "below filter.high=30",
        ),
        (LossSettings(whitening=WhiteningConfig(scope="group")), "no task term to whiten"),
        (objective(clip_low=1.0), "0 <= clip_low < 1"),
        (objective(clip_high=-0.1), "0 <= clip_low < 1"),
        (LossSettings(updates_per_step=0), "batch.updates_per_step=0"),
        (
            LossSettings(whitening=WhiteningConfig(scope="sample"), task=TASK),
            "leaves nothing",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: LossSettings, words: str) -> None:
    for allowed in (False, True):
        chosen = replace(settings.objective, allow_biased=allowed)
        with pytest.raises(ConfigError) as caught:
            check_settings(replace(settings, objective=chosen))
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (LossSettings(filter=FilterConfig(score="kl", low=70)), "chooses by the very token"),
        (
            LossSettings(correction=CorrectionConfig(level="geometric_mean")),
            "no importance weight",
        ),
        (objective(discount=1.0), "ratio of the whole response"),
        (LossSettings(task=TASK), "the reward of a response needs the ratio of the whole response"),
        (
            objective(normalization="sequence_mean"),
            "a length that the sampled token itself decides",
        ),
        (
            LossSettings(whitening=WhiteningConfig(scope="batch", of="distillation")),
            "the divergence that is to go down",
        ),
        (
            LossSettings(
                whitening=WhiteningConfig(scope="group", of="sum"),
                task=TASK,
                correction=CorrectionConfig(kind="none"),
            ),
            "the divergence that is to go down",
        ),
    ],
)
def test_settings_that_tilt_the_gradient_need_permission(
    settings: LossSettings, words: str
) -> None:
    with pytest.raises(ConfigError, match="allow_biased") as caught:
        check_settings(settings)
    assert words in str(caught.value)
    check_settings(replace(settings, objective=replace(settings.objective, allow_biased=True)))


def test_what_is_exact_needs_no_permission() -> None:
    for settings in (
        objective(discount=1.0, estimator="policy_gradient"),
        objective(discount=0.5),
    ):
        for correction in (CorrectionConfig(kind="none"), CorrectionConfig(level="sequence")):
            check_settings(replace(settings, correction=correction))
    check_settings(LossSettings(filter=FilterConfig(score="student_entropy", low=70)))
    check_settings(
        LossSettings(
            objective=ObjectiveConfig(estimator="support_matching"),
            filter=FilterConfig(score="kl", low=70),
        )
    )
    for correction in (CorrectionConfig(kind="none"), CorrectionConfig(level="sequence")):
        group = WhiteningConfig(scope="group")
        check_settings(LossSettings(whitening=group, task=TASK, correction=correction))


def test_the_whole_vocabulary_is_no_list_and_refused_for_served_teachers() -> None:
    for name in SUPPORTS:
        settings = objective(estimator="support_matching", support=name)
        if name != "full":
            check_served(settings, ["main"])
            continue
        with pytest.raises(ConfigError, match="sends lists") as caught:
            check_served(settings, ["main"])
        assert "objective.support='full'" in str(caught.value)
        assert "teachers.main.engine=in_process" in str(caught.value)


def test_the_overlap_of_a_list_that_is_not_the_teacher_s_own_is_not_reported() -> None:
    settings = LossSettings(
        objective=ObjectiveConfig(
            estimator="support_matching", support="union", report_overlap=True
        ),
        served_lists=True,
        only_served=True,
    )
    assert settings.student_topk == 0 and not settings.reports_overlap
    with pytest.raises(ConfigError, match=r"objective\.report_overlap"):
        check_served(settings, ["main"])


def test_the_surrogate_of_a_list_of_tokens_is_refused_over_the_whole_vocabulary() -> None:
    check_in_process(objective(estimator="support_matching", support="full"))
    check_in_process(objective(estimator="topk_surrogate", support="union"))
    with pytest.raises(ConfigError, match="never listed"):
        check_in_process(
            objective(estimator="topk_surrogate", support="full", measure="renormalized")
        )
