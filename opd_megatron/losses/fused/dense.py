"""The full-vocabulary divergence against an in-process teacher, and the student's statistics with it.

Both models' logits are sharded alike. With pi = softmax(student / temperature) and q =
softmax(teacher / teacher_temperature) over the real vocabulary,

    D_f(pi || q) = sum_v q_v f(r_v),  r = pi / q
    dD / dz_v = p_v (f'(r_v) - sum_u p_u f'(r_u)) / temperature

for every f of `divergences`; a constant in f' drops out. The statistics of `token_stats` come from
the same call, so a loss may mix the divergence with log-probs and entropy and still has one backward.
A teacher's -inf is an ordinary value: its log-ratio is bounded to MAX_LOG_RATIO.

Reads: forward two of each logits (normalisers first, then the sums over both), backward one.
Collectives under tensor parallelism: three all-reduces forward, MAX of [2 T], SUM of [T, 4 + 2 J']
with J' = 1 + J and SUM of [T, 2]; none backward. Kept for backward: both logits (no copies) and a
few numbers a token. Working memory: one block of rows. With `grad_in_place` the gradient overwrites
the student's logits.

Left out: gradients of the teacher, teachers with another vocabulary or another padding.

Shape suffixes: T tokens, V vocabulary, J ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.checks import (
    LOGIT_DTYPES,
    LossInputError,
    check_device,
    check_dtype,
    check_shape,
)
from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.fused.dense_rows import DenseGradient, DensePair, DenseRows
from opd_megatron.losses.fused.row_gradient import RowGradient
from opd_megatron.losses.fused.rows import Backend, RowFunctions, row_functions
from opd_megatron.losses.fused.shard import (
    Merged,
    Moments,
    Shard,
    all_reduce,
    check_finite,
    check_has_mass,
    check_logits,
    check_temperature,
    completed,
    make_shard,
    rescaled,
    wanted_ids,
)
from opd_megatron.losses.token_stats import (
    TokenStats,
    check_overwritable,
    gradient_buffer,
    stats_of,
)


@dataclass(frozen=True)
class DenseStats:
    """divergence_T: [T] D_f(student || teacher), differentiable by the student's logits.

    student: as from `token_stats`, differentiable. teacher: the same of the teacher at its own
    temperature and the same ids, constants.
    """

    divergence_T: torch.Tensor
    student: TokenStats
    teacher: TokenStats


@dataclass(frozen=True)
class DenseSettings:
    """How a pair of logits is worked on; made by `dense_stats` and `dense_chunked`."""

    shard: Shard
    scales: tuple[float, float]
    functions: RowFunctions
    rows: DenseRows
    allow_nan: bool
    grad_in_place: bool


def _merge_both(
    student: Moments, teacher: Moments, owned_TJ: torch.Tensor, shard: Shard
) -> tuple[Merged, Merged]:
    """Whole-row statistics of both models with two all-reduces."""
    max_2T = torch.stack([student.max_T, teacher.max_T])
    all_reduce(max_2T, dist.ReduceOp.MAX, shard.group)
    parts = [
        *rescaled(student, max_2T[0], owned_TJ),
        *rescaled(teacher, max_2T[1], owned_TJ),
    ]
    packed = torch.cat(parts, dim=1)
    all_reduce(packed, dist.ReduceOp.SUM, shard.group)
    of_student, of_teacher = packed.tensor_split(2, dim=1)
    return completed(max_2T[0], of_student), completed(max_2T[1], of_teacher)


class _DenseStats(torch.autograd.Function):
    """(student, teacher, ids) -> (D, log_z, entropy, log-probs; log_z, entropy, log-probs of q)."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: torch.Tensor,
        teacher_TV: torch.Tensor,
        ids_TJ: torch.Tensor,
        settings: DenseSettings,
    ) -> tuple[torch.Tensor, ...]:
        shard, scales = settings.shard, settings.scales
        local_ids_TJ = shard.local_ids(ids_TJ)
        real = slice(0, shard.num_real)
        moments = [
            settings.functions.moments(logits_TV[:, real], local_ids_TJ, scale)
            for logits_TV, scale in zip((student_TV, teacher_TV), scales, strict=True)
        ]
        if not settings.allow_nan:
            check_finite("local_logits_TV", moments[0], student_TV.shape)
            check_finite("teacher_local_logits_TV", moments[1], teacher_TV.shape)
        student, teacher = _merge_both(moments[0], moments[1], local_ids_TJ >= 0, shard)
        if not settings.allow_nan:
            check_has_mass("local_logits_TV", student, student_TV.shape)
            check_has_mass("teacher_local_logits_TV", teacher, teacher_TV.shape)
        pair = DensePair(
            student_TV[:, real], teacher_TV[:, real], *scales, student.log_z_T, teacher.log_z_T
        )
        sums_T2 = settings.rows.sums(pair)
        all_reduce(sums_T2, dist.ReduceOp.SUM, shard.group)
        divergence_T, slope_sum_T = (x.contiguous() for x in sums_T2.unbind(1))
        outputs = (divergence_T, student.log_z_T, student.entropy_T, student.logprobs_TJ)
        constants = (teacher.log_z_T, teacher.entropy_T, teacher.logprobs_TJ)
        ctx.save_for_backward(
            student_TV, teacher_TV, local_ids_TJ, slope_sum_T, *outputs[1:], *constants
        )
        ctx.settings = settings
        ctx.mark_non_differentiable(*constants)
        return *outputs, *constants

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        settings: DenseSettings = ctx.settings
        student_TV, teacher_TV, local_ids_TJ, slope_sum_T, *saved = ctx.saved_tensors
        log_z_T, entropy_T, logprobs_TJ, teacher_log_z_T, _, teacher_logprobs_TJ = saved
        row = RowGradient(
            log_z_T=log_z_T,
            entropy_T=entropy_T,
            dense_T=grads[1] - grads[3].sum(-1),
            grad_entropy_T=grads[2],
            local_ids_TJ=local_ids_TJ,
            logprobs_TJ=logprobs_TJ,
            grad_logprobs_TJ=grads[3],
        )
        num_real = settings.shard.num_real
        out_TV = gradient_buffer(student_TV, num_real, settings.grad_in_place)
        pair = DensePair(
            student_TV.detach()[:, :num_real],
            teacher_TV[:, :num_real],
            *settings.scales,
            log_z_T,
            teacher_log_z_T,
        )
        grad = DenseGradient(grads[0], slope_sum_T, row)
        settings.rows.gradient(pair, teacher_logprobs_TJ, grad, out_TV[:, :num_real])
        return out_TV, None, None, None


def apply_dense(
    student_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    ids_TJ: torch.Tensor,
    settings: DenseSettings,
    has_support: bool,
) -> DenseStats:
    """`dense_stats` for inputs that were checked."""
    apply = cast(
        Callable[..., tuple[torch.Tensor, ...]],
        _DenseStats.apply,  # pyright: ignore[reportUnknownMemberType]
    )
    outputs = apply(student_TV, teacher_TV.detach(), ids_TJ, settings)
    return DenseStats(
        divergence_T=outputs[0],
        student=stats_of(Merged(*outputs[1:4]), has_support),
        teacher=stats_of(Merged(*outputs[4:7]), has_support),
    )


def dense_stats(
    local_logits_TV: torch.Tensor,
    teacher_local_logits_TV: torch.Tensor,
    target_ids_T: torch.Tensor,
    divergence: Divergence,
    *,
    support_ids_TJ: torch.Tensor | None = None,
    vocab_size: int,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    allow_nan: bool = False,
    backend: Backend = "auto",
    grad_in_place: bool = False,
) -> DenseStats:
    """D_f over the full vocabulary and the statistics of both models, per token.

    Args:
        local_logits_TV: [T, V / tp] of the student, as in `token_stats`.
        teacher_local_logits_TV: [T, V / tp], sharded and padded as the student's, another floating
            dtype allowed (float64 only together); constants. -inf is an ordinary value.
        divergence: which f; see `divergences.make_divergence`.
        target_ids_T, support_ids_TJ, vocab_size, group, allow_nan: as in `token_stats`.
        temperature: the student's logits are divided by it.
        teacher_temperature: the teacher's logits are divided by it.
        backend: of the statistics, see `fused.rows`; the divergence part is compiled for all but
            `torch`.
        grad_in_place: backward overwrites the student's logits; see `token_stats`.

    Returns:
        DenseStats, float32 (float64 for float64 logits).

    Raises:
        LossInputError: wrong dtype or shape, id outside the vocabulary, NaN or +inf, or logits that
            can not be overwritten; raised before any collective.
        ConfigError: a backend that is unknown or can not run here.
    """
    check_logits("local_logits_TV", local_logits_TV)
    num_tokens, local_size = local_logits_TV.shape
    check_device("teacher_local_logits_TV", teacher_local_logits_TV, local_logits_TV.device)
    check_dtype("teacher_local_logits_TV", teacher_local_logits_TV, LOGIT_DTYPES)
    check_shape("teacher_local_logits_TV", teacher_local_logits_TV, (num_tokens, local_size))
    dtypes = (local_logits_TV.dtype, teacher_local_logits_TV.dtype)
    if (torch.float64 in dtypes) and dtypes[0] != dtypes[1]:
        raise LossInputError(
            f"teacher_local_logits_TV: dtype {dtypes[1]} seen with {dtypes[0]} of the student, "
            "float64 wanted for both or for none"
        )
    ids_TJ = wanted_ids(
        num_tokens, target_ids_T, support_ids_TJ, vocab_size, local_logits_TV.device
    )
    check_temperature("temperature", temperature)
    check_temperature("teacher_temperature", teacher_temperature)
    shard = make_shard("local_logits_TV", local_logits_TV.shape, local_size, vocab_size, group)
    if grad_in_place:
        check_overwritable("local_logits_TV", local_logits_TV)
    functions = row_functions(backend, local_logits_TV.device, local_logits_TV.dtype)
    settings = DenseSettings(
        shard=shard,
        scales=(1.0 / temperature, 1.0 / teacher_temperature),
        functions=functions,
        rows=DenseRows(divergence, compiled=functions.name != "torch"),
        allow_nan=allow_nan,
        grad_in_place=grad_in_place,
    )
    return apply_dense(
        local_logits_TV, teacher_local_logits_TV, ids_TJ, settings, support_ids_TJ is not None
    )
