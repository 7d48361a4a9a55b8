"""Which objectives exist, what each really descends, and which are refused. Imports no torch.

One row per (divergence, estimator) that a recipe can name. "proven" means that a test computes the
exact expected gradient over a small vocabulary and finds the declared target's, to 1e-10 in
float64; "biased" that the expected gradient is proven to be that of something else, named here.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Objective:
    """One line of the list.

    Attributes:
        target: the divergence in a formula, student pi, teacher q.
        descends: what the expected gradient is the gradient of; equal to `target` when proven.
        why_biased: empty when proven.
    """

    divergence: str
    estimator: str
    target: str
    descends: str
    why_biased: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.divergence}/{self.estimator}"

    @property
    def proven(self) -> bool:
        return not self.why_biased


_TARGETS = {
    "reverse_kl": ("KL(pi || q)", "Tinker, MiniLLM; k1"),
    "forward_kl": ("KL(q || pi)", "Hinton 2015 on student samples"),
    "jsd": ("w KL(q || m) + (1-w) KL(pi || m), m = w q + (1-w) pi", "Lin 1991; GKD 2306.13649"),
    "squared_hellinger": ("sum (sqrt pi - sqrt q)^2 / 2", "Csiszar 1967"),
    "alpha": ("(sum pi^a q^(1-a) - 1) / (a (a-1))", "Cichocki and Amari 2010"),
    "tsallis": ("(sum pi^a q^(1-a) - 1) / (a - 1)", "Tsallis 1998"),
    "chi2": ("sum (pi - q)^2 / q", "Pearson"),
    "total_variation": ("sum |pi - q| / 2", "f-DISTILL 2307.15190"),
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


def _rows() -> tuple[Objective, ...]:
    rows: list[Objective] = []
    for divergence, (target, source) in _TARGETS.items():
        rows.append(Objective(divergence, "policy_gradient", target, target, "", source))
        exact = divergence == "reverse_kl"  # f(r) / r = log r = f'(r) - f'(1)
        rows.append(
            Objective(
                divergence,
                "value_as_advantage",
                target,
                target if exact else "D_g, r g'(r) = f(r)",
                "" if exact else _VALUE,
                _SCHULMAN,
            )
        )
    for estimator, (descends, why) in _REVERSE_KL_ONLY.items():
        target = _TARGETS["reverse_kl"][0]
        rows.append(Objective("reverse_kl", estimator, target, descends, why, _SCHULMAN))
    return tuple(rows)


OBJECTIVES = _rows()


def find_objective(divergence: str, estimator: str) -> Objective:
    """The row of a pair.

    Raises:
        ConfigError: no such divergence, no such estimator, or not together.
    """
    divergences = {row.divergence: None for row in OBJECTIVES}
    estimators = {row.estimator: None for row in OBJECTIVES}
    for key, name, known in (
        ("divergence", divergence, divergences),
        ("estimator", estimator, estimators),
    ):
        if name not in known:
            raise ConfigError(
                f"objective.{key}={name!r}: no such {key}{did_you_mean(name, known)}; "
                f"use one of: {', '.join(known)}"
            )
    for row in OBJECTIVES:
        if (row.divergence, row.estimator) == (divergence, estimator):
            return row
    raise ConfigError.of(
        "objective.estimator",
        estimator,
        f"is defined for reverse_kl, not for {divergence}",
        "use policy_gradient",
    )


def check_objective(objective: ObjectiveConfig) -> Objective:
    """Refuse what can not be computed, and what is biased unless the recipe allows it.

    Returns:
        The row of the list.

    Raises:
        ConfigError: see above.
    """
    row = find_objective(objective.divergence, objective.estimator)
    if objective.divergence == "jsd" and not 0.0 < objective.jsd_teacher_weight < 1.0:
        raise ConfigError.of(
            "objective.jsd_teacher_weight",
            objective.jsd_teacher_weight,
            "must lie strictly between 0 and 1, where the divergence is zero",
            "use forward_kl or reverse_kl for the limits",
        )
    if objective.divergence in ("alpha", "tsallis") and (
        not 0.0 < objective.alpha <= 2.0 or objective.alpha == 1.0
    ):
        raise ConfigError.of(
            "objective.alpha",
            objective.alpha,
            "must lie in (0, 2] and not be 1",
            "use forward_kl for 0 and reverse_kl for 1",
        )
    if not row.proven and not objective.allow_biased:
        raise ConfigError.of(
            "objective.estimator",
            objective.estimator,
            f"with divergence {objective.divergence} it descends {row.descends} ({row.why_biased})",
            "use policy_gradient, or set objective.allow_biased=true to do it all the same",
        )
    if objective.discount != 0.0:
        raise ConfigError.of(
            "objective.discount",
            objective.discount,
            "the learner computes per-token returns only",
            "set it to 0",
        )
    if objective.entropy_bonus < 0.0:
        raise ConfigError.of(
            "objective.entropy_bonus", objective.entropy_bonus, "must be >= 0", "use 0 for none"
        )
    return row
