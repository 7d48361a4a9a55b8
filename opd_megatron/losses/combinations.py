"""Which settings of a loss go together: what can not be computed, and what is not what it says.

`check_settings` is called by `opd validate`, before anything starts, and by the learner. Whatever
makes the expected gradient another one than the declared target's is refused with the reason,
unless the recipe says `objective.allow_biased`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from opd_megatron.errors import ConfigError
from opd_megatron.losses.catalog import Objective, find_objective
from opd_megatron.losses.settings import LossSettings


def _parameters(settings: LossSettings) -> Iterator[ConfigError]:
    objective, correction, tokens = settings.objective, settings.correction, settings.filter
    for section, config in vars(settings).items():
        for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
            value, choices = getattr(config, field.name), field.metadata.get("choices")
            if choices and value not in choices:
                yield ConfigError.of(
                    f"{section}.{field.name}",
                    value,
                    "no such choice",
                    f"use one of: {', '.join(choices)}",
                )
    if objective.divergence == "jsd" and not 0.0 < objective.jsd_teacher_weight < 1.0:
        yield ConfigError.of(
            "objective.jsd_teacher_weight",
            objective.jsd_teacher_weight,
            "must lie strictly between 0 and 1, where the divergence is zero",
            "use forward_kl or reverse_kl for the limits",
        )
    if objective.divergence in ("alpha", "tsallis") and (
        not 0.0 < objective.alpha <= 2.0 or objective.alpha == 1.0
    ):
        yield ConfigError.of(
            "objective.alpha",
            objective.alpha,
            "must lie in (0, 2] and not be 1",
            "use forward_kl for 0 and reverse_kl for 1",
        )
    for key, value in (
        ("objective.entropy_bonus", objective.entropy_bonus),
        ("objective.coefficient", objective.coefficient),
        ("task.coefficient", settings.task.coefficient),
    ):
        if value < 0.0:
            yield ConfigError.of(key, value, "must be >= 0", "use 0 for none")
    if objective.coefficient == 0.0 and settings.task.coefficient == 0.0:
        yield ConfigError.of(
            "objective.coefficient", 0.0, "nothing is left to learn from", "raise it above 0"
        )
    if settings.updates_per_step < 1:
        yield ConfigError.of(
            "batch.updates_per_step", settings.updates_per_step, "must be >= 1", "use 1"
        )
    if not 0.0 <= objective.clip_low < 1.0 or objective.clip_high < 0.0:
        yield ConfigError.of(
            "objective.clip_low, objective.clip_high",
            (objective.clip_low, objective.clip_high),
            "must satisfy 0 <= clip_low < 1 and clip_high >= 0: bounds around a ratio of 1",
            "e.g. 0.2 and 0.2",
        )
    if not 0.0 <= correction.low <= correction.high:
        yield ConfigError.of(
            "correction.low",
            correction.low,
            f"must lie in [0, correction.high={correction.high}]",
            "order the bounds",
        )
    if tokens.score != "none" and not 0.0 <= tokens.low < tokens.high <= 100.0:
        yield ConfigError.of(
            "filter.low",
            tokens.low,
            f"must be below filter.high={tokens.high}, both percentiles in [0, 100]",
            "e.g. filter.low=70 filter.high=100",
        )
    if not 0.0 <= objective.discount <= 1.0:
        yield ConfigError.of(
            "objective.discount", objective.discount, "must lie in [0, 1]", "fix it"
        )


def _together(settings: LossSettings) -> Iterator[ConfigError]:
    objective = settings.objective
    if objective.discount > 0.0 and objective.estimator != "policy_gradient":
        yield ConfigError.of(
            "objective.discount",
            objective.discount,
            f"later tokens can be charged to a sampled one only, not with {objective.estimator}",
            "set it to 0, or objective.estimator=policy_gradient",
        )
    if settings.whitening.scope != "none" and settings.whitening.of == "task":
        if settings.task.coefficient == 0.0:
            yield ConfigError.of(
                "whitening.scope",
                settings.whitening.scope,
                "there is no task term to whiten (task.coefficient=0)",
                "set whitening.scope=none",
            )
        if settings.whitening.scope == "sample":
            yield ConfigError.of(
                "whitening.scope",
                "sample",
                "a response has one reward, so whitening it within itself leaves nothing",
                "use group or batch",
            )


def _supervised(settings: LossSettings) -> Iterator[ConfigError]:
    """Parts that need a rollout, a teacher or a reward, which given responses do not have."""
    if not settings.is_supervised:
        return
    given = "the responses of objective.estimator=cross_entropy are given"
    wanted = (
        ("correction.kind", settings.correction.kind, "none", "no engine sampled them"),
        ("whitening.scope", settings.whitening.scope, "none", "there is no advantage to whiten"),
        ("task.coefficient", settings.task.coefficient, 0.0, "a reward of them teaches nothing"),
        ("batch.updates_per_step", settings.updates_per_step, 1, "there is no old policy to clip"),
        (
            "objective.report_overlap",
            settings.objective.report_overlap,
            False,
            "there is no support",
        ),
    )
    for key, value, allowed, why in wanted:
        if value != allowed:
            yield ConfigError.of(key, value, f"{given}: {why}", f"set {key}={str(allowed).lower()}")
    if settings.filter.score in ("kl", "teacher_entropy"):
        yield ConfigError.of(
            "filter.score",
            settings.filter.score,
            f"{given}: no teacher scores them",
            "use student_entropy or none",
        )


def _biased(settings: LossSettings, row: Objective) -> Iterator[ConfigError]:
    objective = settings.objective
    allow = "set objective.allow_biased=true to do it all the same"
    if not row.proven:
        yield ConfigError.of(
            "objective.estimator",
            objective.estimator,
            f"with divergence {objective.divergence} it descends {row.descends} ({row.why_biased})",
            f"use another one of `opd objectives`, or {allow}",
        )
    correction = settings.correction
    if correction.kind != "none" and correction.level == "geometric_mean":
        yield ConfigError.of(
            "correction.level",
            "geometric_mean",
            "the mean ratio of a response is no importance weight of its tokens",
            f"use token or sequence, or {allow}",
        )
    for key, value, what in (
        ("objective.discount", objective.discount, "the cost of later tokens"),
        ("task.coefficient", settings.task.coefficient, "the reward of a response"),
    ):
        if value > 0.0 and correction.kind != "none" and correction.level == "token":
            yield ConfigError.of(
                "correction.level",
                "token",
                f"with {key}={value} {what} needs the ratio of the whole response",
                f"use correction.level=sequence or correction.kind=none, or {allow}",
            )
        if value > 0.0 and settings.truncated:
            yield ConfigError.of(
                key,
                value,
                f"with truncated rollouts (rollout.top_p, top_k, min_p) {what} also pays for leaving the tokens that "
                "were kept: their probabilities do not sum to 1",
                f"set rollout.top_p=1.0 rollout.top_k=-1 rollout.min_p=0.0, or {allow}",
            )
    # Given responses have the length that they have.
    is_sampled = not settings.has_support and not settings.is_supervised
    if objective.normalization == "sequence_mean" and is_sampled:
        yield ConfigError.of(
            "objective.normalization",
            "sequence_mean",
            "divides by a length that the sampled token itself decides (an end token shortens it), which tilts "
            "the average",
            f"use token_mean or support_matching, or {allow}",
        )
    if settings.whitening.scope != "none" and settings.whitening.of != "task":
        yield ConfigError.of(
            "whitening.of",
            settings.whitening.of,
            "takes away the mean of the distillation term, the divergence that is to go down",
            f"use whitening.of=task, or {allow}",
        )
    if settings.filter.score == "kl" and not settings.has_support:
        yield ConfigError.of(
            "filter.score",
            "kl",
            "chooses by the very token whose gradient is averaged, which tilts the average",
            f"use student_entropy or teacher_entropy, support_matching, or {allow}",
        )


def check_settings(settings: LossSettings) -> Objective:
    """Refuse what can not be computed, and what is biased unless the recipe allows it.

    Returns:
        The row of the catalog.

    Raises:
        ConfigError: see above; the first violation.
    """
    row = find_objective(settings.objective)
    for error in (*_parameters(settings), *_supervised(settings), *_together(settings)):
        raise error
    if not settings.objective.allow_biased:
        for error in _biased(settings, row):
            raise error
    return row


def check_served(settings: LossSettings, served: Sequence[str]) -> None:
    """Refuse what served teachers can not send.

    Args:
        served: names of the teachers that servers hold.

    Raises:
        ConfigError: the support is the whole vocabulary, or the overlap is to be reported of a list that is not
            the teacher's own.
    """
    objective = settings.objective
    if settings.has_full_support:
        engines = " ".join(f"teachers.{name}.engine=in_process" for name in served)
        raise ConfigError.of(
            "objective.support",
            objective.support,
            "is no list of tokens, and a served teacher sends lists",
            f"set {engines}; or use teacher_topk with objective.topk=V, which is the same for a small vocabulary",
        )
    if settings.served_lists and objective.report_overlap:
        raise ConfigError.of(
            "objective.report_overlap",
            True,
            f"a served teacher's list for {objective.support} is not its own top-K",
            "set it to false, or use intersection, whose divergence is over the overlap",
        )


def check_in_process(settings: LossSettings) -> None:
    """Refuse what is not computed from a teacher's logits.

    Raises:
        ConfigError: the top-K surrogate over the whole vocabulary.
    """
    if settings.has_full_support and settings.objective.estimator != "support_matching":
        raise ConfigError.of(
            "objective.support",
            "full",
            f"{settings.objective.estimator} is of a list of tokens, and the whole vocabulary is never listed",
            "set objective.estimator=support_matching: over all tokens, student-weighted, both have one gradient",
        )
