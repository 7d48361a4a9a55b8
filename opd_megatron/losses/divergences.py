"""f-divergences D_f = sum_v q_v f(r_v) of student pi and teacher q, r = pi / q, l = log r.

    name               f(r)                                         -A(r) = f'(r) - f'(1)
    reverse_kl         r log r                                      l
    forward_kl         -log r                                       1 - 1/r
    jsd                (1-w) r (l - log M) - w log M                (1-w) (l - log M)
    squared_hellinger  (sqrt r - 1)^2 / 2                           (1 - r^-1/2) / 2
    alpha              (r^a - a r - (1-a)) / (a (a-1))              (r^(a-1) - 1) / (a-1)
    tsallis            a times alpha                                a times alpha
    chi2               (r - 1)^2                                    2 (r - 1)
    total_variation    |r - 1| / 2                                  sign(r - 1) / 2

with M = w + (1-w) r, w the teacher's weight in the mixture of jsd, and a in (0, 2], a != 1 the
order of alpha and tsallis (a -> 1 is reverse_kl, a -> 0 is forward_kl, a = 1/2 is four times
squared_hellinger, a = 2 half chi2).

Directions in words: reverse_kl = KL(pi || q), student against teacher, seeks modes; forward_kl =
KL(q || pi), teacher against student, covers mass; jsd = w KL(q || m) + (1-w) KL(pi || m), m = w q +
(1-w) pi, mixed in probabilities. A constant in f' has no expected gradient (E_pi[grad log pi] = 0),
so the advantage is centered: A = 0 where student and teacher agree, which keeps its variance down
and moves nothing there, whatever the weights.

Sources: Csiszar 1967 (f-divergences); Lin 1991 (jsd with weights); Cichocki and Amari 2010 (alpha);
Tsallis 1998.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.registry import Registry

Function = Callable[[torch.Tensor], torch.Tensor]
Terms = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """One f-divergence, as functions of log-probs.

    Attributes:
        f: log r -> f(r), any shape.
        derivative: log r -> f'(r) - f'(1), any shape; its negative is the advantage.
        terms: (log pi, log q) -> q f(pi / q), differentiable by log pi; finite inputs only.
        slope_at_one: f'(1). q f(r) - f'(1) (pi - q) is never negative, whatever the masses.

    Example: reverse_kl at pi = 0.5, q = 0.25: f = 2 log 2, derivative = log 2, terms = 0.5 log 2.
    """

    name: str
    f: Function
    derivative: Function
    terms: Terms
    slope_at_one: float


DIVERGENCES: Registry[Callable[[ObjectiveConfig], Divergence]] = Registry("divergence")


@DIVERGENCES.register("reverse_kl")
def reverse_kl(_: ObjectiveConfig) -> Divergence:
    """KL(student || teacher) = sum pi log(pi / q), nats: student against teacher, seeks modes.

    Source: Kullback and Leibler 1951; for distillation on the student's own samples MiniLLM, 2306.08543.
    """
    return Divergence(
        name="reverse_kl",
        f=lambda log_r: log_r.exp() * log_r,
        derivative=lambda log_r: log_r,
        terms=lambda log_p, log_q: log_p.exp() * (log_p - log_q),
        slope_at_one=1.0,
    )


@DIVERGENCES.register("forward_kl")
def forward_kl(_: ObjectiveConfig) -> Divergence:
    """KL(teacher || student) = sum q log(q / pi), nats: teacher against student, covers mass.

    Source: Kullback and Leibler 1951; knowledge distillation, Hinton 2015, 1503.02531.
    """
    return Divergence(
        name="forward_kl",
        f=lambda log_r: -log_r,
        derivative=lambda log_r: -torch.expm1(-log_r),
        terms=lambda log_p, log_q: log_q.exp() * (log_q - log_p),
        slope_at_one=-1.0,
    )


@DIVERGENCES.register("jsd")
def jsd(objective: ObjectiveConfig) -> Divergence:
    """w KL(teacher || m) + (1 - w) KL(student || m), m = w q + (1 - w) pi, nats: both against their mixture.

    w = objective.jsd_teacher_weight. Source: Lin 1991; GKD, 2306.13649.
    """
    weight = objective.jsd_teacher_weight
    log_w, log_v = math.log(weight), math.log1p(-weight)

    def log_mixture(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(log_v + log_p, log_w + log_q)

    def terms(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        log_m = log_mixture(log_p, log_q)
        student = (1.0 - weight) * log_p.exp() * (log_p - log_m)
        return student + weight * log_q.exp() * (log_q - log_m)

    def derivative(log_r: torch.Tensor) -> torch.Tensor:
        return (1.0 - weight) * (log_r - log_mixture(log_r, torch.zeros_like(log_r)))

    return Divergence(
        name="jsd",
        f=lambda log_r: terms(log_r, torch.zeros_like(log_r)),
        derivative=derivative,
        terms=terms,
        slope_at_one=0.0,
    )


@DIVERGENCES.register("squared_hellinger")
def squared_hellinger(_: ObjectiveConfig) -> Divergence:
    """sum (sqrt pi - sqrt q)^2 / 2, in [0, 1], no unit: symmetric. Source: Hellinger 1909; Csiszar 1967."""
    return Divergence(
        name="squared_hellinger",
        f=lambda log_r: 0.5 * torch.expm1(0.5 * log_r).square(),
        derivative=lambda log_r: -0.5 * torch.expm1(-0.5 * log_r),
        terms=lambda log_p, log_q: 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square(),
        slope_at_one=0.0,
    )


def _alpha_family(order: float, scale: float, name: str) -> Divergence:
    factor = scale / (order * (order - 1.0))

    def terms(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        power = (order * log_p + (1.0 - order) * log_q).exp()
        return factor * (power - order * log_p.exp() - (1.0 - order) * log_q.exp())

    return Divergence(
        name=name,
        f=lambda log_r: terms(log_r, torch.zeros_like(log_r)),
        derivative=lambda log_r: scale * torch.expm1((order - 1.0) * log_r) / (order - 1.0),
        terms=terms,
        slope_at_one=0.0,
    )


@DIVERGENCES.register("alpha")
def alpha(objective: ObjectiveConfig) -> Divergence:
    """(sum pi^a q^(1-a) - 1) / (a (a - 1)), a = objective.alpha, no unit.

    Between forward_kl (a -> 0) and reverse_kl (a -> 1). On a part of the vocabulary the sum of
    (pi^a q^(1-a) - a pi - (1-a) q) / (a (a - 1)). Source: Cichocki and Amari 2010.
    """
    return _alpha_family(objective.alpha, 1.0, "alpha")


@DIVERGENCES.register("tsallis")
def tsallis(objective: ObjectiveConfig) -> Divergence:
    """(sum pi^a q^(1-a) - 1) / (a - 1), no unit: the Tsallis relative entropy of student against teacher.

    Order a = objective.alpha; a times `alpha`. Source: Tsallis 1998, Physical Review E 58, 1442.
    """
    return _alpha_family(objective.alpha, objective.alpha, "tsallis")


@DIVERGENCES.register("chi2")
def chi2(_: ObjectiveConfig) -> Divergence:
    """sum (pi - q)^2 / q, no unit: student against teacher, Pearson's. Source: Pearson 1900; Csiszar 1967."""
    return Divergence(
        name="chi2",
        f=lambda log_r: torch.expm1(log_r).square(),
        derivative=lambda log_r: 2.0 * torch.expm1(log_r),
        terms=lambda log_p, log_q: (2.0 * log_p - log_q).exp() - 2.0 * log_p.exp() + log_q.exp(),
        slope_at_one=0.0,
    )


@DIVERGENCES.register("total_variation")
def total_variation(_: ObjectiveConfig) -> Divergence:
    """sum |pi - q| / 2, in [0, 1], no unit: symmetric; the derivative at r = 1, where there is none, is taken as 0.

    Source: f-DISTILL, 2307.15190.
    """
    return Divergence(
        name="total_variation",
        f=lambda log_r: 0.5 * torch.expm1(log_r).abs(),
        derivative=lambda log_r: 0.5 * log_r.sign(),
        terms=lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs(),
        slope_at_one=0.0,
    )


def make_divergence(objective: ObjectiveConfig) -> Divergence:
    """The divergence a recipe names, with its parameters (`catalog.check_objective` checks those).

    Raises:
        ConfigError: unknown name.
    """
    return DIVERGENCES.get(objective.divergence, "objective.divergence")(objective)
