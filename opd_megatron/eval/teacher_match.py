"""How well a teacher fits a student, from what both say of the student's own responses.

At every response position both models list their K likeliest tokens and the log-prob of the sampled one. With p the
student and q the teacher, at temperature 1, in nats:

    reverse       KL(p || q): exact where K is the vocabulary, else the mean of log p(y) - log q(y) over sampled tokens
    forward       KL(q || p): exact where K is the vocabulary, else a lower bound: tokens that are not known on both
                  sides count as one (merging tokens never raises a KL)
    overlap       share of the n likeliest tokens that both have in common, S its tokens
    student_mass  sum of p over S;  teacher_mass  sum of q over S
    end_agreement of the positions where the likeliest token of either ends the response, the share where both do

Small KLs and a large shared mass say that the teacher judges tokens that the student says; none of them says that the
teacher is better than the student, which only its accuracy does.

Shapes: L positions, K listed tokens, likeliest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_megatron.eval.kl import dense_logprobs, kl_per_position
from opd_megatron.teacher.joint import Listing, candidates, known


@dataclass(frozen=True)
class Listed:
    """What one model says of one response of L tokens. All in the student's ids."""

    sampled_logprobs: NDArray[np.float32]  # [L]
    ids: NDArray[np.int32]  # [L, K]
    logprobs: NDArray[np.float32]  # [L, K]


@dataclass(frozen=True)
class TeacherMatch:
    """Means over positions; see the module docstring. None: there was no position to measure it at.

    `exact`: both KLs are of the whole vocabulary; otherwise `reverse_error` is the standard error of `reverse`.
    """

    reverse: float
    forward: float
    exact: bool
    reverse_error: float
    overlap: float
    student_mass: float
    teacher_mass: float
    end_agreement: float | None
    num_tokens: int


def match_teacher(
    pairs: Sequence[tuple[Listed, Listed]],
    sampled_ids: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    num_top: int,
    end_ids: Sequence[int],
) -> TeacherMatch:
    """Compare.

    Args:
        pairs: (student, teacher) of each response.
        sampled_ids: the tokens of each response.
        num_top: n of the overlap, at most K.
        end_ids: tokens that end a response.

    Raises:
        ValueError: no token at all.
    """
    parts = [
        _positions(student, teacher, np.asarray(ids), vocab_size, num_top, end_ids)
        for (student, teacher), ids in zip(pairs, sampled_ids, strict=True)
        if len(ids)
    ]
    if not parts:
        raise ValueError("no response has a token")
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    reverse_L = values["reverse"]
    either = int(values["either_ends"].sum())
    return TeacherMatch(
        reverse=float(reverse_L.mean()),
        forward=float(values["forward"].mean()),
        exact=pairs[0][0].ids.shape[1] == vocab_size,
        reverse_error=float(reverse_L.std() / np.sqrt(len(reverse_L))),
        overlap=float(values["overlap"].mean()),
        student_mass=float(values["student_mass"].mean()),
        teacher_mass=float(values["teacher_mass"].mean()),
        end_agreement=float(values["both_end"].sum() / either) if either else None,
        num_tokens=len(reverse_L),
    )


def _positions(
    student: Listed,
    teacher: Listed,
    sampled_L: NDArray[np.int64],
    vocab_size: int,
    num_top: int,
    end_ids: Sequence[int],
) -> dict[str, NDArray]:
    """The values of one response, [L] each."""
    if student.ids.shape[1] == vocab_size:
        log_p = dense_logprobs(student.ids, student.logprobs, vocab_size)
        log_q = dense_logprobs(teacher.ids, teacher.logprobs, vocab_size)
        reverse, forward = kl_per_position(log_p, log_q), kl_per_position(log_q, log_p)
    else:
        reverse = student.sampled_logprobs.astype(np.float64) - teacher.sampled_logprobs
        forward = _forward_bound(student, teacher, sampled_L)
    student_top, teacher_top = student.ids[:, :num_top], teacher.ids[:, :num_top]
    shared_LK = (student_top[:, :, None] == teacher_top[:, None, :]).any(axis=2)
    shared_of_teacher_LK = (teacher_top[:, :, None] == student_top[:, None, :]).any(axis=2)
    student_ends = np.isin(student.ids[:, 0], end_ids)
    teacher_ends = np.isin(teacher.ids[:, 0], end_ids)
    return {
        "reverse": reverse,
        "forward": forward,
        "overlap": shared_LK.mean(axis=1),
        "student_mass": (np.exp(student.logprobs[:, :num_top]) * shared_LK).sum(axis=1),
        "teacher_mass": (np.exp(teacher.logprobs[:, :num_top]) * shared_of_teacher_LK).sum(axis=1),
        "both_end": student_ends & teacher_ends,
        "either_ends": student_ends | teacher_ends,
    }


def _forward_bound(
    student: Listed, teacher: Listed, sampled_L: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[L] KL(q || p) over the tokens whose log-prob both sides stated, the rest as one."""
    listings = [
        Listing(
            side.sampled_logprobs.astype(np.float64),
            side.ids.astype(np.int64),
            side.logprobs.astype(np.float64),
        )
        for side in (student, teacher)
    ]
    ids_LJ = candidates(listings, sampled_L[:, None])
    is_sampled = ids_LJ == sampled_L[:, None]
    log_p_LJ, log_q_LJ = (
        np.where(is_sampled, listing.sampled_L[:, None], known(ids_LJ, listing))
        for listing in listings
    )
    shared_LJ = ~np.isnan(log_p_LJ) & ~np.isnan(log_q_LJ)
    with_rest = [_with_rest(np.where(shared_LJ, logs, -np.inf)) for logs in (log_q_LJ, log_p_LJ)]
    return kl_per_position(*with_rest)


def _with_rest(logprobs_LJ: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L, J + 1] with one more entry for all other tokens."""
    rest_L = np.log(np.maximum(1.0 - np.exp(logprobs_LJ).sum(axis=1), 1e-12))
    return np.concatenate([logprobs_LJ, rest_L[:, None]], axis=1)
