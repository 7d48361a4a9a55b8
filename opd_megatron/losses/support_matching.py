"""Divergences over a support, differentiated through the student. No sampling noise at a position.

Student p and teacher q at the J valid entries of a support S become measures by one of

    renormalized   p / sum_S p,  q / sum_S q         blind to mass outside S
    tail_bucket    p, q and one entry 1 - sum_S      two distributions, merged outside S
    raw            p, q as they are                  D may be negative, has a slope at p = q
    generalized    as raw, minus f'(1) (p - q)       never negative, 0 only for p = q on S

    D_f(S) = sum over entries of q f(p / q)

With S the whole vocabulary all four are the divergence itself.

`surrogate` is the top-K form of Rethinking OPD: sum_S w_k sg[log p_k - log q_k] log p_k, K kept
inside the sum, with w_k = sg[p_k], q_k or 1. What it descends:

    student_p   sum_S p log(p/q) - p + q    renormalized: the reverse KL on S
    teacher_p   sum_S q log^2(p/q) / 2
    none        sum_S log^2(p/q) / 2

A divergence of a position depends on the prefix only. Multiplied as a constant with log pi(y) it
has no expected gradient, so it is never offered as an advantage.

Shape suffixes: T tokens, J support entries.
"""

from __future__ import annotations

import math

import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import LOGPROB_DTYPES, check_dtype, check_no_nan, check_shape
from opd_megatron.losses.corrections import MAX_LOG_RATIO
from opd_megatron.losses.divergences import Divergence

NORMALIZATIONS = ("renormalized", "tail_bucket", "raw", "generalized")
TOKEN_WEIGHTS = ("student_p", "teacher_p", "none")

# Stands for log 0: exp gives exactly 0 in float32 and float64, and 0 * it is 0 instead of NaN.
_LOG_ZERO = -1000.0
# Less mass than this outside the support is rounding: float32 log-probs sum to 1 within about 1e-6.
_LEAST_TAIL = {torch.float32: 1e-6, torch.float64: 1e-13}


def _check(
    student_logprobs_TJ: torch.Tensor,
    teacher_logprobs_TJ: torch.Tensor,
    valid_TJ: torch.Tensor,
    allow_nan: bool,
) -> None:
    check_dtype("student_logprobs_TJ", student_logprobs_TJ, LOGPROB_DTYPES)
    check_shape("student_logprobs_TJ", student_logprobs_TJ, ("T", "J"))
    shape = tuple(student_logprobs_TJ.shape)
    check_dtype("teacher_logprobs_TJ", teacher_logprobs_TJ, (student_logprobs_TJ.dtype,))
    check_shape("teacher_logprobs_TJ", teacher_logprobs_TJ, shape)
    check_dtype("valid_TJ", valid_TJ, (torch.bool,))
    check_shape("valid_TJ", valid_TJ, shape)
    if not allow_nan:
        check_no_nan("teacher_logprobs_TJ", teacher_logprobs_TJ.masked_fill(~valid_TJ, 0.0))


def _floored(logprobs_TJ: torch.Tensor, valid_TJ: torch.Tensor) -> torch.Tensor:
    return logprobs_TJ.masked_fill(~valid_TJ, _LOG_ZERO).clamp_min(_LOG_ZERO)


def _log_tail(logprobs_TJ: torch.Tensor) -> torch.Tensor:
    """log(1 - sum exp), [T, 1]."""
    least = _LEAST_TAIL[logprobs_TJ.dtype]
    mass = logprobs_TJ.logsumexp(1, keepdim=True).clamp_max(math.log1p(-least))
    return torch.log(-torch.expm1(mass))


def _measures(
    student_logprobs_TJ: torch.Tensor,
    teacher_logprobs_TJ: torch.Tensor,
    valid_TJ: torch.Tensor,
    normalization: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log of the two measures that are compared, finite; invalid entries have no mass."""
    if normalization not in NORMALIZATIONS:
        raise ConfigError.of(
            "normalization", normalization, "unknown", f"use one of: {', '.join(NORMALIZATIONS)}"
        )
    student, teacher = (
        _floored(student_logprobs_TJ, valid_TJ),
        _floored(teacher_logprobs_TJ, valid_TJ),
    )
    if normalization == "renormalized":
        student = student - student.logsumexp(1, keepdim=True)
        teacher = teacher - teacher.logsumexp(1, keepdim=True)
    elif normalization == "tail_bucket":
        student = torch.cat([student, _log_tail(student)], dim=1)
        teacher = torch.cat([teacher, _log_tail(teacher)], dim=1)
    # A token that the teacher calls impossible costs a bounded log-ratio, as for sampled tokens.
    return student, torch.maximum(teacher, student.detach() - MAX_LOG_RATIO)


def support_divergence(
    divergence: Divergence,
    student_logprobs_TJ: torch.Tensor,
    teacher_logprobs_TJ: torch.Tensor,
    valid_TJ: torch.Tensor,
    normalization: str,
    *,
    allow_nan: bool = False,
) -> torch.Tensor:
    """D_f on the support, per position.

    Args:
        divergence: which f.
        student_logprobs_TJ: [T, J] log pi at the support ids, carries the gradient.
        teacher_logprobs_TJ: [T, J] log q at the same ids, same dtype; -inf is an ordinary value.
        valid_TJ: [T, J] bool; a row without valid entries gives 0.
        normalization: see the module docstring.
        allow_nan: let a NaN from the teacher make the result NaN instead of raising.

    Returns:
        [T], differentiable by the student's log-probs.

    Raises:
        ConfigError: unknown normalization.
        LossInputError: wrong dtype or shape, or NaN from the teacher.
    """
    _check(student_logprobs_TJ, teacher_logprobs_TJ, valid_TJ, allow_nan)
    student, teacher = _measures(student_logprobs_TJ, teacher_logprobs_TJ, valid_TJ, normalization)
    terms = divergence.terms(student, teacher)
    if normalization == "generalized":
        terms = terms - divergence.slope_at_one * (student.exp() - teacher.exp())
    return terms.sum(1)


def surrogate(
    student_logprobs_TJ: torch.Tensor,
    teacher_logprobs_TJ: torch.Tensor,
    valid_TJ: torch.Tensor,
    normalization: str,
    token_weights: str,
    *,
    allow_nan: bool = False,
) -> torch.Tensor:
    """Top-K policy-gradient surrogate of the reverse KL, per position; see the module docstring.

    Args:
        student_logprobs_TJ, teacher_logprobs_TJ, valid_TJ: as in `support_divergence`.
        normalization: `renormalized` or `raw`.
        token_weights: `student_p`, `teacher_p` or `none`.
        allow_nan: as in `support_divergence`.

    Returns:
        [T]; its gradient means something, its value does not.

    Raises:
        ConfigError: unknown normalization or token weights.
        LossInputError: wrong dtype or shape, or NaN from the teacher.
    """
    _check(student_logprobs_TJ, teacher_logprobs_TJ, valid_TJ, allow_nan)
    if normalization not in ("renormalized", "raw"):
        raise ConfigError.of(
            "normalization", normalization, "the surrogate has none such", "use renormalized or raw"
        )
    if token_weights not in TOKEN_WEIGHTS:
        raise ConfigError.of(
            "token_weights", token_weights, "unknown", f"use one of: {', '.join(TOKEN_WEIGHTS)}"
        )
    student, teacher = _measures(student_logprobs_TJ, teacher_logprobs_TJ, valid_TJ, normalization)
    log_ratio = (student - teacher).detach()
    if token_weights == "student_p":
        weights = student.detach().exp()
    elif token_weights == "teacher_p":
        weights = teacher.exp()
    else:
        weights = torch.ones_like(log_ratio)
    terms = torch.where(valid_TJ, weights * log_ratio * student, torch.zeros_like(student))
    return terms.sum(1)


def support_masses(
    student_logprobs_TJ: torch.Tensor, teacher_logprobs_TJ: torch.Tensor, valid_TJ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability that student and teacher put on the support, [T] each, detached."""
    student = torch.where(valid_TJ, student_logprobs_TJ.detach().exp(), 0.0).sum(1)
    return student, torch.where(valid_TJ, teacher_logprobs_TJ.exp(), 0.0).sum(1)
