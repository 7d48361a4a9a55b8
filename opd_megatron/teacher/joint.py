"""The tokens of a support and a target's log-probs at them, from what served teachers said.

Candidates of a position are the top-K of every member and, if the support wants it, the student's. Each member's
log-prob is known at those in its own list, and at all others once it was asked (`asking.py`). A token that some member
has not scored is left out: the support shrinks, what stays is exact, and the mass that went is bounded, because a
token outside a top-K is no likelier than its last entry and all of them together have no more than its rest.

Shape suffixes: M members, L positions, K entries of a list, J candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_megatron.teacher.mixing import Mixed, mix
from opd_megatron.teacher.target import Target

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Listing:
    """What one member said of one response: its own top-K, likeliest first, ids as the student means them."""

    sampled_L: Floats
    ids_LK: Ids
    logprobs_LK: Floats


@dataclass(frozen=True)
class JointScores:
    """The target at the tokens of a support.

    ids_LJ: -1 where there is none; logprobs_LJ: -inf there. left_out_L: at most this probability of the target
    is on candidates that were left out. error_L: nats by which the log-probs may be off (`mixing.Mixed`).
    """

    sampled_L: Floats
    ids_LJ: Ids
    logprobs_LJ: Floats
    left_out_L: Floats
    error_L: Floats


def candidates(listings: Sequence[Listing], student_ids_LK: Ids | None) -> Ids:
    """[L, J] distinct ids, -1 for repeated ones: all that a member listed and the student's."""
    parts = [listing.ids_LK for listing in listings]
    if student_ids_LK is not None:
        parts.append(student_ids_LK)
    ids_LJ = np.sort(np.concatenate(parts, axis=1), axis=1)
    repeated = np.zeros(ids_LJ.shape, dtype=np.bool_)
    repeated[:, 1:] = ids_LJ[:, 1:] == ids_LJ[:, :-1]
    return np.where(repeated, -1, ids_LJ)


def known(ids_LJ: Ids, listing: Listing) -> Floats:
    """[L, J] log-probs of the ids in the listing, NaN of the others and of -1."""
    if listing.ids_LK.shape[1] == 0:
        return np.full(ids_LJ.shape, np.nan)
    # One sorted key for all rows: row * (largest id + 2) + id.
    span = int(max(ids_LJ.max(initial=0), listing.ids_LK.max(initial=0))) + 2
    rows_L1 = np.arange(len(ids_LJ), dtype=np.int64)[:, None] * span
    keys = (rows_L1 + listing.ids_LK).ravel()
    order = np.argsort(keys)
    wanted = (rows_L1 + np.maximum(ids_LJ, 0)).ravel()
    place = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
    hit = (keys[order[place]] == wanted) & (ids_LJ.ravel() >= 0)
    values = np.where(hit, listing.logprobs_LK.ravel()[order[place]], np.nan)
    return values.reshape(ids_LJ.shape)


def _in(ids_LJ: Ids, ids_LK: Ids) -> NDArray[np.bool_]:
    """[L, J] whether an id stands in the same row of the other; False for -1."""
    return ~np.isnan(known(ids_LJ, Listing(np.zeros(0), ids_LK, np.zeros(ids_LK.shape))))


def missing(ids_LJ: Ids, listing: Listing) -> Ids:
    """[L, J] the ids that the listing does not have, -1 elsewhere."""
    return np.where(np.isnan(known(ids_LJ, listing)), ids_LJ, -1)


def join(
    target: Target,
    listings: Sequence[Listing],
    ids_LJ: Ids,
    asked: Sequence[Floats | None],
    *,
    support: str,
    topk: int,
    student_ids_LK: Ids | None = None,
) -> JointScores:
    """The target on the support.

    Args:
        listings: of each member, in the target's order.
        ids_LJ: `candidates` of them.
        asked: of each member, [L, J] log-probs from a second request, NaN where it was not asked; None: no request.
        support: `teacher_topk` for the target's own top-K; `student_topk`, `union` or `symmetric_difference`.
        topk: K of either side. student_ids_LK: [L, K], -1 where missing.
    """
    scores_MLJ = np.stack([known(ids_LJ, listing) for listing in listings])
    for row, more in zip(scores_MLJ, asked, strict=True):
        if more is not None:
            np.copyto(row, more, where=np.isnan(row))
    valid_LJ = (ids_LJ >= 0) & ~np.isnan(scores_MLJ).any(axis=0)
    sampled_ML = np.stack([listing.sampled_L for listing in listings])
    weights = [weight for _, weight in target.weights]
    if target.mean:
        mixed = mix(target.mean, weights, scores_MLJ, sampled_ML, valid_LJ)
    else:
        alone_LJ = np.where(valid_LJ, scores_MLJ[0], -np.inf)
        mixed = Mixed(alone_LJ, sampled_ML[0], np.zeros(len(ids_LJ)), np.zeros(len(ids_LJ)))
    # Of what was listed beyond the K of anybody nothing is missed; it serves the normaliser of a geometric mean.
    wished_LJ = np.any([_in(ids_LJ, listing.ids_LK[:, :topk]) for listing in listings], axis=0)
    if student_ids_LK is not None:
        wished_LJ |= _in(ids_LJ, student_ids_LK)
    left_out_L = _left_out(weights, listings, scores_MLJ, wished_LJ & ~valid_LJ)
    chosen_LJ = _chosen(support, ids_LJ, mixed.logprobs_LJ, valid_LJ, topk, student_ids_LK)
    width = 2 * topk if support in ("union", "symmetric_difference") else topk
    ids, logprobs = _packed(ids_LJ, mixed.logprobs_LJ, chosen_LJ, width)
    bound_L = np.minimum(left_out_L * np.exp(-mixed.low_log_z_L), 1.0)
    return JointScores(mixed.sampled_L, ids, logprobs, bound_L, mixed.error_L)


def _chosen(
    support: str,
    ids_LJ: Ids,
    logprobs_LJ: Floats,
    valid_LJ: NDArray[np.bool_],
    topk: int,
    student_ids_LK: Ids | None,
) -> NDArray[np.bool_]:
    """[L, J] the candidates that are in the support."""
    rank_LJ = np.argsort(np.argsort(-logprobs_LJ, axis=1, kind="stable"), axis=1, kind="stable")
    of_target = valid_LJ & (rank_LJ < topk)
    if support == "teacher_topk":
        return of_target
    assert student_ids_LK is not None, support
    of_student = valid_LJ & _in(ids_LJ, student_ids_LK)
    return {
        "student_topk": of_student,
        "union": of_target | of_student,
        "symmetric_difference": of_target ^ of_student,
    }[support]


def _left_out(
    weights: Sequence[float],
    listings: Sequence[Listing],
    scores_MLJ: Floats,
    gone_LJ: NDArray[np.bool_],
) -> Floats:
    """[L] bound on the probability of the candidates that are gone; of a geometric mean, times its Z."""
    total_L = np.zeros(len(gone_LJ))
    for weight, listing, scores_LJ in zip(weights, listings, scores_MLJ, strict=True):
        unknown_LJ = gone_LJ & np.isnan(scores_LJ)
        seen_L = np.where(gone_LJ & ~unknown_LJ, np.exp(scores_LJ), 0.0).sum(axis=1)
        last_L = np.exp(listing.logprobs_LK[:, -1]) if listing.logprobs_LK.shape[1] else 1.0
        rest_L = np.maximum(1.0 - np.exp(listing.logprobs_LK).sum(axis=1), 0.0)
        total_L += weight * (seen_L + np.minimum(unknown_LJ.sum(axis=1) * last_L, rest_L))
    return total_L


def _packed(
    ids_LJ: Ids, logprobs_LJ: Floats, chosen_LJ: NDArray[np.bool_], width: int
) -> tuple[Ids, Floats]:
    """The chosen ones, likeliest first, in `width` columns."""
    ids = np.where(chosen_LJ, ids_LJ, -1)
    logprobs = np.where(chosen_LJ, logprobs_LJ, -np.inf)
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :width]
    ids, logprobs = (np.take_along_axis(array, order, axis=1) for array in (ids, logprobs))
    short = width - ids.shape[1]
    if short > 0:
        ids = np.pad(ids, ((0, 0), (0, short)), constant_values=-1)
        logprobs = np.pad(logprobs, ((0, 0), (0, short)), constant_values=-np.inf)
    return np.where(np.isneginf(logprobs) & (ids < 0), -1, ids), logprobs
