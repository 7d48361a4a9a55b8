"""A support and the teacher's log-probs on it, from what a served teacher sends.

A server sends the teacher's K most likely tokens of a position and the log-prob of the sampled one.
Supports made of those ids alone (`SERVED_SUPPORTS`) need nothing else, and the student's own top-K
where they intersect with it. Of those that the student chose (`LISTED_SUPPORTS`) the list that came is the
support itself: the controller asked for it by the tokens that were likeliest when the student sampled.

Shape suffixes: T tokens, K teacher entries, J support entries.
"""

from __future__ import annotations

import math

import torch

from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.settings import LISTED_SUPPORTS
from opd_megatron.losses.supports import Support, SupportSources, make_support
from opd_megatron.losses.token_loss import SupportInputs


def served_support(
    name: str,
    *,
    vocab_size: int,
    topk_ids_TK: torch.Tensor,
    topk_logprobs_TK: torch.Tensor,
    sampled_ids_T: torch.Tensor,
    sampled_logprobs_T: torch.Tensor,
    student_ids_TK: torch.Tensor | None = None,
) -> tuple[Support, SupportInputs]:
    """The support of that name and the teacher's log-probs at it.

    Args:
        name: one of `SERVED_SUPPORTS` or `LISTED_SUPPORTS`.
        topk_ids_TK, topk_logprobs_TK: [T, K] of the teacher, likeliest first, or the list; -1 where missing.
        sampled_ids_T, sampled_logprobs_T: [T] of the sampled token under the teacher.
        student_ids_TK: [T, K], for `intersection`.

    Returns:
        The support, and the teacher at its ids.

    Raises:
        LossInputError: the support holds an id that the teacher did not score.
    """
    support = make_support(
        "teacher_topk" if name in LISTED_SUPPORTS else name,
        SupportSources(
            vocab_size=vocab_size,
            teacher_ids_TK=topk_ids_TK,
            student_ids_TK=student_ids_TK,
            sampled_ids_T=sampled_ids_T,
        ),
    )
    # teacher_topk and intersection keep the teacher's columns; the sampled token is one more.
    columns = [topk_logprobs_TK]
    if name == "teacher_topk_plus_sampled":
        columns.append(sampled_logprobs_T[:, None])
    teacher_TJ = torch.cat(columns, dim=1)
    if teacher_TJ.shape != support.ids_TJ.shape:
        raise LossInputError(
            f"support {name!r}: {list(support.ids_TJ.shape)} ids, of which a served teacher scores "
            f"{list(teacher_TJ.shape)}; it needs a teacher inside the learner"
        )
    return support, SupportInputs(teacher_TJ, support.valid_TJ)


def topk_entropy(topk_logprobs_NK: torch.Tensor) -> torch.Tensor:
    """Entropy of a distribution known at its K most likely entries, all others as one. [N], nats.

    A lower bound of the entropy, exact for K >= V - 1: splitting the rest can only raise it.
    """
    logprobs = topk_logprobs_NK.double().clamp_min(-1000.0)
    mass_N = logprobs.exp().sum(1).clamp_max(1.0)
    rest_N = 1.0 - mass_N
    rest_term_N = torch.where(rest_N > 1e-7, -rest_N * rest_N.clamp_min(math.exp(-700)).log(), 0.0)
    return (-(logprobs.exp() * logprobs).sum(1) + rest_term_N).float()
