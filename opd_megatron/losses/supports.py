"""Supports: the tokens of a position that a support-matching loss looks at.

    teacher_topk               the teacher's K most likely tokens
    student_topk               the student's
    union                      tokens in either
    intersection               tokens in both
    symmetric_difference       tokens in exactly one
    teacher_topk_plus_sampled  the teacher's and the token that was sampled
    full                       the whole vocabulary

A support is constant: no gradient flows through the choice of tokens. Every row has the same number
J of entries; entries that do not count (repeated, missing, not in the set) are invalid and hold id
0. An id of -1 in an input means "missing", so that K may exceed the vocabulary.

Shape suffixes: T tokens, K entries of one side, J entries of the support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from opd_megatron.losses.checks import ID_DTYPES, LossInputError, check_dtype, check_shape
from opd_megatron.registry import Registry


@dataclass(frozen=True)
class Support:
    """ids_TJ [T, J] int64, 0 where invalid; valid_TJ [T, J] bool."""

    ids_TJ: torch.Tensor
    valid_TJ: torch.Tensor


@dataclass(frozen=True)
class SupportSources:
    """What a support can be made of; leave out what it does not need.

    teacher_ids_TK, student_ids_TK: [T, K] int, -1 where missing. sampled_ids_T: [T] int.
    """

    vocab_size: int
    teacher_ids_TK: torch.Tensor | None = None
    student_ids_TK: torch.Tensor | None = None
    sampled_ids_T: torch.Tensor | None = None


SUPPORTS: Registry[Callable[[SupportSources], Support]] = Registry("support")


def _checked(name: str, ids: torch.Tensor | None, vocab_size: int, wanted: int) -> torch.Tensor:
    if ids is None:
        raise LossInputError(f"{name}: nothing seen, [T{', K' * (wanted - 1)}] ids wanted")
    check_dtype(name, ids, ID_DTYPES)
    check_shape(name, ids, ("T", "K")[:wanted])
    if ids.numel():
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < -1 or high >= vocab_size:
            raise LossInputError(
                f"{name}: ids in [{low}, {high}] seen (shape {list(ids.shape)}), "
                f"[0, {vocab_size - 1}] or -1 wanted"
            )
    return ids.long()


def _teacher_ids(sources: SupportSources) -> torch.Tensor:
    return _checked("teacher_ids_TK", sources.teacher_ids_TK, sources.vocab_size, 2)


def _student_ids(sources: SupportSources) -> torch.Tensor:
    return _checked("student_ids_TK", sources.student_ids_TK, sources.vocab_size, 2)


def first_occurrence(ids_TJ: torch.Tensor) -> torch.Tensor:
    """[T, J] bool: True at the first occurrence of an id in its row, False at repeats and at -1."""
    order = ids_TJ.sort(dim=1, stable=True)
    first = torch.ones_like(order.values, dtype=torch.bool)
    first[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    return torch.zeros_like(first).scatter(1, order.indices, first) & (ids_TJ >= 0)


def is_member(ids_TJ: torch.Tensor, others_TK: torch.Tensor) -> torch.Tensor:
    """Whether each id occurs in the same row of `others_TK`; False for -1. [T, J] bool."""
    if others_TK.shape[1] == 0:
        return torch.zeros_like(ids_TJ, dtype=torch.bool)
    ordered = others_TK.sort(dim=1).values.contiguous()
    place = torch.searchsorted(ordered, ids_TJ.contiguous()).clamp_max(others_TK.shape[1] - 1)
    return (ordered.gather(1, place) == ids_TJ) & (ids_TJ >= 0)


def _support(ids_TJ: torch.Tensor, valid_TJ: torch.Tensor) -> Support:
    return Support(torch.where(valid_TJ, ids_TJ, torch.zeros_like(ids_TJ)), valid_TJ)


@SUPPORTS.register("teacher_topk")
def teacher_topk(sources: SupportSources) -> Support:
    """J = K."""
    ids = _teacher_ids(sources)
    return _support(ids, first_occurrence(ids))


@SUPPORTS.register("student_topk")
def student_topk(sources: SupportSources) -> Support:
    """J = K; the teacher's log-probs at these ids must be asked for."""
    ids = _student_ids(sources)
    return _support(ids, first_occurrence(ids))


@SUPPORTS.register("union")
def union(sources: SupportSources) -> Support:
    """J = K of the teacher + K of the student."""
    ids = torch.cat([_teacher_ids(sources), _student_ids(sources)], dim=1)
    return _support(ids, first_occurrence(ids))


@SUPPORTS.register("intersection")
def intersection(sources: SupportSources) -> Support:
    """J = K of the teacher; a row may be empty."""
    teacher, student = _teacher_ids(sources), _student_ids(sources)
    return _support(teacher, first_occurrence(teacher) & is_member(teacher, student))


@SUPPORTS.register("symmetric_difference")
def symmetric_difference(sources: SupportSources) -> Support:
    """J = K of the teacher + K of the student; a row may be empty."""
    teacher, student = _teacher_ids(sources), _student_ids(sources)
    ids = torch.cat([teacher, student], dim=1)
    in_both = torch.cat([is_member(teacher, student), is_member(student, teacher)], dim=1)
    return _support(ids, first_occurrence(ids) & ~in_both)


@SUPPORTS.register("teacher_topk_plus_sampled")
def teacher_topk_plus_sampled(sources: SupportSources) -> Support:
    """J = K + 1; the last entry is the sampled token, invalid where the teacher has it already."""
    sampled = _checked("sampled_ids_T", sources.sampled_ids_T, sources.vocab_size, 1)
    ids = torch.cat([_teacher_ids(sources), sampled[:, None]], dim=1)
    return _support(ids, first_occurrence(ids))


@SUPPORTS.register("full")
def full(sources: SupportSources) -> Support:
    """J = V; the number of rows is that of `sampled_ids_T`."""
    sampled = _checked("sampled_ids_T", sources.sampled_ids_T, sources.vocab_size, 1)
    ids = torch.arange(sources.vocab_size, device=sampled.device).expand(sampled.shape[0], -1)
    return Support(ids, torch.ones_like(ids, dtype=torch.bool))


def make_support(name: str, sources: SupportSources) -> Support:
    """The support of that name.

    Raises:
        ConfigError: unknown name.
        LossInputError: an input is missing, or has the wrong dtype, shape or ids.
    """
    return SUPPORTS.get(name, "support")(sources)
