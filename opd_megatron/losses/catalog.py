"""Which objectives exist, what each really descends, and which need permission. Imports no torch.

One row per objective that a recipe can name. "proven" means that a test computes the exact expected
gradient over a small vocabulary and finds the declared target's, to 1e-10 in float64; "biased" that
the expected gradient is proven to be that of something else, named in the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.divergences import DIVERGENCES
from opd_megatron.config.schema import SUPERVISED_ESTIMATOR, SUPPORTS, ObjectiveConfig
from opd_megatron.errors import ConfigError, did_you_mean
from opd_megatron.losses.settings import SUPPORT_ESTIMATORS


@dataclass(frozen=True)
class Objective:
    """One line of the list.

    Attributes:
        measure: how the mass outside a support is treated; empty for sampled-token estimators.
        token_weights: of the top-K surrogate; empty otherwise.
        target: the divergence in a formula, student pi, teacher q.
        descends: what the expected gradient is the gradient of; equal to `target` when proven.
        why_biased: empty when proven.
    """

    divergence: str
    estimator: str
    measure: str
    token_weights: str
    target: str
    descends: str
    why_biased: str
    source: str

    @property
    def name(self) -> str:
        parts = (self.divergence, self.estimator, self.measure, self.token_weights)
        return "/".join(part for part in parts if part)

    @property
    def is_supervised(self) -> bool:
        return self.estimator == SUPERVISED_ESTIMATOR

    @property
    def proven(self) -> bool:
        return not self.why_biased

    @property
    def supports(self) -> tuple[str, ...]:
        """Names of the supports it is defined on; empty: the sampled token."""
        return SUPPORTS if self.measure else ()


# Summed over a part of the vocabulary it is this form that is meant; over all of it nothing changes.
_LOCAL_TARGETS = {
    "alpha": "sum (pi^a q^(1-a) - a pi - (1-a) q) / (a (a-1))",
    "tsallis": "sum (pi^a q^(1-a) - a pi - (1-a) q) / (a - 1)",
}
_SCHULMAN = "Schulman 2020, Approximating KL divergence"
_VALUE = "a value estimate in place of a derivative"
# What the estimators that exist for the reverse KL only descend, and why that is not KL(pi || q).
_REVERSE_KL_ONLY = {
    "k2_as_advantage": ("E_pi[l^2/2 - l + 1], l = log(pi/q)", _VALUE),
    "k3_as_advantage": ("KL(pi || q) - KL(q || pi)", _VALUE),
    "k2_differentiated": ("KL(pi || q)", ""),
    "k3_differentiated": ("KL(q || pi)", "the gradient of k3 is the forward KL's"),
}
# What D becomes on a support S.
_MEASURES = {
    "tail_bucket": "on S and one entry for all other tokens",
    "renormalized": "on S, both renormalized to it",
    "raw": "summed over S only",
    "generalized": "summed over S, minus f'(1) (pi - q): least at pi = q",
}
# Summed over a part of the vocabulary, f with a slope at r = 1 is least somewhere else.
_SLOPED = {"reverse_kl", "forward_kl"}
_RETHINKING = "Rethinking OPD, top-K surrogate"
_OTHER_WEIGHT = "the weight is not the student's probability"
# (measure, token weights): (descends, why that is not the reverse KL on S)
_SURROGATES = {
    ("renormalized", "student_p"): ("KL(pi_S || q_S)", ""),
    ("raw", "student_p"): ("sum_S pi log(pi/q) - pi + q", ""),
    ("renormalized", "teacher_p"): ("sum_S q_S log^2(pi_S/q_S) / 2", _OTHER_WEIGHT),
    ("raw", "teacher_p"): ("sum_S q log^2(pi/q) / 2", _OTHER_WEIGHT),
    ("renormalized", "none"): ("sum_S log^2(pi_S/q_S) / 2", _OTHER_WEIGHT),
    ("raw", "none"): ("sum_S log^2(pi/q) / 2", _OTHER_WEIGHT),
}


def _sampled_rows(divergence: str, target: str, source: str) -> list[Objective]:
    # f(r) / r = log r = f'(r) - f'(1) for the reverse KL only.
    exact = divergence == "reverse_kl"
    descends, why = (target, "") if exact else ("D_g, r g'(r) = f(r)", _VALUE)
    return [
        Objective(divergence, "policy_gradient", "", "", target, target, "", source),
        Objective(divergence, "value_as_advantage", "", "", target, descends, why, _SCHULMAN),
    ]


def _rows() -> tuple[Objective, ...]:
    rows: list[Objective] = []
    for divergence, (target, source) in DIVERGENCES.items():
        rows += _sampled_rows(divergence, target, source)
    target = DIVERGENCES["reverse_kl"][0]
    for estimator, (descends, why) in _REVERSE_KL_ONLY.items():
        rows.append(Objective("reverse_kl", estimator, "", "", target, descends, why, _SCHULMAN))
    for divergence, (formula, source) in DIVERGENCES.items():
        for measure, words in _MEASURES.items():
            if measure in ("raw", "generalized"):
                formula = _LOCAL_TARGETS.get(divergence, formula)
            target = descends = f"{formula}, {words}"
            why = ""
            if measure == "raw" and divergence in _SLOPED:
                target = f"{formula}, {_MEASURES['generalized']}"
                why = "over a part of the vocabulary it is least elsewhere than at pi = q"
            rows.append(
                Objective(
                    divergence, "support_matching", measure, "", target, descends, why, source
                )
            )
    for (measure, weights), (descends, why) in _SURROGATES.items():
        target = "KL(pi_S || q_S)" if measure == "renormalized" else "sum_S pi log(pi/q) - pi + q"
        rows.append(
            Objective(
                "reverse_kl", "topk_surrogate", measure, weights, target, descends, why, _RETHINKING
            )
        )
    target = "KL(data || pi)"
    rows.append(
        Objective(
            "forward_kl",
            SUPERVISED_ESTIMATOR,
            "",
            "",
            target,
            target,
            "",
            "negative log-likelihood",
        )
    )
    return tuple(rows)


OBJECTIVES = _rows()


def _key_of(row: Objective) -> tuple[str, str, str, str]:
    return row.divergence, row.estimator, row.measure, row.token_weights


def find_objective(objective: ObjectiveConfig) -> Objective:
    """The row that a recipe's objective is.

    Raises:
        ConfigError: no such divergence, estimator or measure, or not together.
    """
    for key, name in (
        ("divergence", objective.divergence),
        ("estimator", objective.estimator),
        ("measure", objective.measure),
        ("token_weights", objective.token_weights),
    ):
        known = {getattr(row, key): None for row in OBJECTIVES if getattr(row, key)}
        if name not in known:
            raise ConfigError(
                f"objective.{key}={name!r}: no such {key}{did_you_mean(name, known)}; "
                f"use one of: {', '.join(known)}"
            )
    wanted = (
        objective.divergence,
        objective.estimator,
        objective.measure if objective.estimator in SUPPORT_ESTIMATORS else "",
        objective.token_weights if objective.estimator == "topk_surrogate" else "",
    )
    for row in OBJECTIVES:
        if _key_of(row) == wanted:
            return row
    if objective.estimator == SUPERVISED_ESTIMATOR:
        raise ConfigError.of(
            "objective.divergence",
            objective.divergence,
            "cross_entropy on given responses descends KL(data || student)",
            "set objective.divergence=forward_kl",
        )
    if objective.divergence != "reverse_kl":
        raise ConfigError.of(
            "objective.estimator",
            objective.estimator,
            f"is defined for reverse_kl, not for {objective.divergence}",
            "use policy_gradient or support_matching",
        )
    raise ConfigError.of(
        "objective.measure",
        objective.measure,
        f"{objective.estimator} has none such",
        "use renormalized or raw",
    )
