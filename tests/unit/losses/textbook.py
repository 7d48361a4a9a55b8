"""Divergences and measures on a support as textbooks write them, independent of the package's code."""

from __future__ import annotations

import torch
from enumeration import VOCAB_SIZE

from opd_megatron.losses.supports import Support

# The parameters that the formulas below are written out for.
PARAMETERS = {"jsd_teacher_weight": 0.3, "alpha": 1.4}
F = {  # q times f(p / q)
    "reverse_kl": lambda p, q: p * (p / q).log(),
    "forward_kl": lambda p, q: q * (q / p).log(),
    "jsd": lambda p, q: (
        0.3 * q * (q / (0.3 * q + 0.7 * p)).log() + 0.7 * p * (p / (0.3 * q + 0.7 * p)).log()
    ),
    "squared_hellinger": lambda p, q: 0.5 * (p.sqrt() - q.sqrt()) ** 2,
    "alpha": lambda p, q: (p**1.4 * q**-0.4 - 1.4 * p + 0.4 * q) / (1.4 * 0.4),
    "tsallis": lambda p, q: (p**1.4 * q**-0.4 - 1.4 * p + 0.4 * q) / 0.4,
    "chi2": lambda p, q: (p - q) ** 2 / q,
    "total_variation": lambda p, q: 0.5 * (p - q).abs(),
}
SLOPE = {"reverse_kl": 1.0, "forward_kl": -1.0}  # f'(1)


def on_support(logp_TV: torch.Tensor, support: Support, measure: str) -> list[torch.Tensor]:
    """Per row: the measure on its valid ids, as plain probabilities."""
    rows = []
    for row, ids, valid in zip(logp_TV, support.ids_TJ, support.valid_TJ, strict=True):
        p = row[ids[valid]].exp()
        if measure == "renormalized" and len(p):
            p = p / p.sum()
        if measure == "tail_bucket" and len(p) < VOCAB_SIZE:
            p = torch.cat([p, 1 - p.sum()[None]])
        rows.append(p)
    return rows


def divergence_on_support(
    name: str, student_TV: torch.Tensor, teacher_TV: torch.Tensor, support: Support, measure: str
) -> torch.Tensor:
    """[T] values, differentiable by the student's log-probs."""
    rows = zip(
        on_support(student_TV, support, measure),
        on_support(teacher_TV, support, measure),
        strict=True,
    )
    slope = SLOPE.get(name, 0.0) if measure == "generalized" else 0.0
    return torch.stack([(F[name](p, q) - slope * (p - q)).sum() for p, q in rows])


def surrogate_target(
    student_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    support: Support,
    measure: str,
    token_weights: str,
) -> torch.Tensor:
    """What the top-K surrogate descends, [T]."""
    values = []
    for p, q in zip(
        on_support(student_TV, support, measure),
        on_support(teacher_TV, support, measure),
        strict=True,
    ):
        log_r = (p / q).log()
        terms = {
            "student_p": p * log_r - p + q,
            "teacher_p": 0.5 * q * log_r**2,
            "none": 0.5 * log_r**2,
        }
        values.append(terms[token_weights].sum())
    return torch.stack(values)
