"""The row functions of the full-vocabulary form: every column of the student meets the teacher's.

With l_p = log pi_v and l_q = log q_v, finite and bounded as in `support_matching` (log 0 counts as
-1000 nats; a token that the teacher calls impossible costs a log-ratio of 60),

    sums       D = sum_v t(l_p, l_q),   G = sum_v s_v,   s_v = d t(l_p, l_q) / d l_p = p_v f'(r_v)
    gradient   dz_v = scale * (g_D (s_v - p_v G) + p_v (A - g_H (log p_v + H)) + sum_j g_j 1[v = id_j])

t(l_p, l_q) = q f(p / q) is the divergence's own `terms`, and s is taken from it by automatic
differentiation of one block of rows. So every registered divergence works, and the compiled form
fuses its formula into one pass without a kernel written for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from opd_megatron.losses.corrections import MAX_LOG_RATIO
from opd_megatron.losses.divergences import Divergence, Terms
from opd_megatron.losses.fused.compiling import run_compiled
from opd_megatron.losses.fused.row_gradient import LOG_FLOOR, RowGradient
from opd_megatron.losses.fused.rows_compiled import BLOCK_ELEMENTS as COMPILED
from opd_megatron.losses.fused.rows_torch import BLOCK_ELEMENTS as EAGER
from opd_megatron.losses.fused.rows_torch import row_blocks
from opd_megatron.losses.fused.support_gradient import write_support_gradient


@dataclass(frozen=True)
class DensePair:
    """The real columns of both shards, their scales (1 / temperature) and whole-row log_z, [T]."""

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    student_scale: float
    teacher_scale: float
    student_log_z_T: torch.Tensor
    teacher_log_z_T: torch.Tensor


@dataclass(frozen=True)
class DenseGradient:
    """Upstream gradient of the divergence and its saved sum G, [T]; `row` holds the rest."""

    grad_divergence_T: torch.Tensor
    slope_sum_T: torch.Tensor
    row: RowGradient


def _terms_and_slopes(
    terms: Terms, log_p: torch.Tensor, log_q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """t and s elementwise from log-probs that may be -inf."""
    bounded_p = log_p.clamp_min(LOG_FLOOR)
    bounded_q = torch.maximum(log_q.clamp_min(LOG_FLOOR), bounded_p - MAX_LOG_RATIO)
    if torch.compiler.is_compiling():
        values, pullback = cast(
            tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor]]],
            torch.func.vjp(lambda x: terms(x, bounded_q), bounded_p),  # pyright: ignore
        )
        (slopes,) = pullback(torch.ones_like(values))
    else:  # the same without loading the compiler, which torch.func does
        with torch.enable_grad():
            leaf = bounded_p.detach().requires_grad_()
            values = terms(leaf, bounded_q)
            (slopes,) = torch.autograd.grad(values, leaf, torch.ones_like(values))
        values = values.detach()
    # A log-prob below the floor is a constant: nothing flows through it.
    return values, torch.where(log_p < LOG_FLOOR, torch.zeros_like(slopes), slopes)


def _sums(
    terms: Terms,
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_scale: float,
    teacher_scale: float,
    student_log_z: torch.Tensor,
    teacher_log_z: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = student_log_z.dtype
    log_p = student.to(dtype) * student_scale - student_log_z[:, None]
    log_q = teacher.to(dtype) * teacher_scale - teacher_log_z[:, None]
    values, slopes = _terms_and_slopes(terms, log_p, log_q)
    return values.sum(-1), slopes.sum(-1)


def _dense_part(
    terms: Terms,
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    grad_divergence: torch.Tensor,
    slope_sum: torch.Tensor,
    dense: torch.Tensor,
    grad_entropy: torch.Tensor,
    entropy: torch.Tensor,
) -> torch.Tensor:
    """The gradient before the scale and without the sparse part."""
    _, slopes = _terms_and_slopes(terms, log_p, log_q)
    p = log_p.exp()
    centered = log_p.clamp_min(LOG_FLOOR) + entropy[:, None]
    of_divergence = grad_divergence[:, None] * (slopes - p * slope_sum[:, None])
    return of_divergence + p * (dense[:, None] - grad_entropy[:, None] * centered)


def _write(
    terms: Terms,
    student: torch.Tensor,
    teacher: torch.Tensor,
    out: torch.Tensor,
    student_scale: float,
    teacher_scale: float,
    student_log_z: torch.Tensor,
    teacher_log_z: torch.Tensor,
    *coefficients: torch.Tensor,
) -> None:
    dtype = student_log_z.dtype
    log_p = student.to(dtype) * student_scale - student_log_z[:, None]
    log_q = teacher.to(dtype) * teacher_scale - teacher_log_z[:, None]
    out.copy_(_dense_part(terms, log_p, log_q, *coefficients) * student_scale)


@dataclass(frozen=True)
class DenseRows:
    """Both functions for one divergence; `compiled` picks torch.compile, else eager torch."""

    divergence: Divergence
    compiled: bool

    def _run(self, function: Callable[..., Any], block_TV: torch.Tensor, *rest: Any) -> Any:
        terms = self.divergence.terms
        if self.compiled:
            return run_compiled(function, (terms,), block_TV, *rest)
        return function(terms, block_TV, *rest)

    def _blocks(self, real_TV: torch.Tensor) -> Iterator[slice]:
        num_rows, num_columns = real_TV.shape
        device = real_TV.device
        # Eager code keeps about ten copies of a block, compiled code none.
        elements = COMPILED[device.type] if self.compiled else EAGER[device.type] // 4
        return row_blocks(num_rows, num_columns, device, elements)

    def sums(self, pair: DensePair) -> torch.Tensor:
        """[T, 2]: this rank's part of D and G."""
        num_rows, num_columns = pair.student_TV.shape
        device = pair.student_TV.device
        sums_T2 = torch.zeros(num_rows, 2, dtype=pair.student_log_z_T.dtype, device=device)
        if num_columns == 0:
            return sums_T2
        for rows in self._blocks(pair.student_TV):
            sums_T2[rows, 0], sums_T2[rows, 1] = self._run(
                _sums,
                pair.student_TV[rows],
                pair.teacher_TV[rows],
                pair.student_scale,
                pair.teacher_scale,
                pair.student_log_z_T[rows],
                pair.teacher_log_z_T[rows],
            )
        return sums_T2

    def gradient(
        self,
        pair: DensePair,
        teacher_logprobs_TJ: torch.Tensor,
        grad: DenseGradient,
        out_TV: torch.Tensor,
    ) -> None:
        """Write the gradient of the student's logits to `out_TV`, which may be the logits.

        teacher_logprobs_TJ: at `grad.row.local_ids_TJ`.
        """
        row = grad.row
        if out_TV.shape[1] == 0:
            return
        coefficients = (
            grad.grad_divergence_T,
            grad.slope_sum_T,
            row.dense_T,
            row.grad_entropy_T,
            row.entropy_T,
        )
        for rows in self._blocks(out_TV):
            self._run(
                _write,
                pair.student_TV[rows],
                pair.teacher_TV[rows],
                out_TV[rows],
                pair.student_scale,
                pair.teacher_scale,
                pair.student_log_z_T[rows],
                pair.teacher_log_z_T[rows],
                *(x[rows] for x in coefficients),
            )
        terms = self.divergence.terms
        dense_TJ = _dense_part(terms, row.logprobs_TJ, teacher_logprobs_TJ, *coefficients)
        write_support_gradient(out_TV, row, dense_TJ, pair.student_scale)
