"""KL between student and teacher at each response position, from log-probs of the vocabulary.

    reverse  KL(student || teacher) = sum_v p_v (log p_v - log q_v)
    forward  KL(teacher || student) = sum_v q_v (log q_v - log p_v)
    entropy  of the student         = -sum_v p_v log p_v

with p the student and q the teacher, in nats, float64. A term with probability 0 in front is 0.
Where the first distribution has mass and the other has none, the KL is infinite, and is said to be.

Shapes: L response positions, K listed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class KlResult:
    """Means over response tokens, in nats.

    `exact` False: no full vocabulary was asked for, so `reverse` is the mean of log p(y) - log q(y)
    over the sampled tokens, `entropy` the mean of -log p(y), and `forward` is unknown (None).
    """

    reverse: float
    forward: float | None
    entropy: float
    num_tokens: int
    exact: bool


def dense_logprobs(ids_LK: NDArray, logprobs_LK: NDArray, vocab_size: int) -> Floats:
    """Lay listed tokens out over the vocabulary; tokens that are not listed get -inf.

    Args:
        ids_LK: [L, K] int, unique in each row.
        logprobs_LK: [L, K] float.

    Returns:
        [L, V] float64.
    """
    dense_LV = np.full((len(ids_LK), vocab_size), -np.inf)
    np.put_along_axis(dense_LV, ids_LK.astype(np.int64), logprobs_LK.astype(np.float64), axis=1)
    return dense_LV


def _expectation(weights_LV: Floats, values_LV: Floats) -> Floats:
    """sum_v w_v * x_v with 0 * inf = 0. [L]."""
    terms_LV = np.zeros_like(weights_LV)
    np.multiply(weights_LV, values_LV, out=terms_LV, where=weights_LV > 0)
    return terms_LV.sum(axis=1)


def kl_per_position(first_LV: Floats, second_LV: Floats) -> Floats:
    """KL(first || second) at each position, from log-probs. [L] float64, may be +inf."""
    # log p - log q, without the inf - inf of tokens that neither can produce.
    difference_LV = np.subtract(
        first_LV, second_LV, out=np.zeros_like(first_LV), where=np.isfinite(first_LV)
    )
    return _expectation(np.exp(first_LV), difference_LV)


def entropy_per_position(logprobs_LV: Floats) -> Floats:
    """Entropy at each position, from log-probs. [L] float64."""
    return -_expectation(np.exp(logprobs_LV), logprobs_LV)


def exact_kl_result(pairs: Sequence[tuple[Floats, Floats]]) -> KlResult:
    """Token means over responses.

    Args:
        pairs: `(student [L, V], teacher [L, V])` log-probs of each response; L may be 0.
    """
    reverse = [kl_per_position(student, teacher) for student, teacher in pairs]
    forward = [kl_per_position(teacher, student) for student, teacher in pairs]
    entropy = [entropy_per_position(student) for student, _ in pairs]
    num_tokens = sum(len(array) for array in reverse)
    return KlResult(_mean(reverse), _mean(forward), _mean(entropy), num_tokens, exact=True)


def sampled_kl_result(pairs: Sequence[tuple[NDArray, NDArray]]) -> KlResult:
    """The k1 estimate from log-probs of sampled tokens; unbiased, but noisy once the KL is small.

    Args:
        pairs: `(student [L], teacher [L])` log-probs of the response tokens.
    """
    student = [first.astype(np.float64) for first, _ in pairs]
    teacher = [second.astype(np.float64) for _, second in pairs]
    difference = [p - q for p, q in zip(student, teacher, strict=True)]
    num_tokens = sum(len(array) for array in difference)
    return KlResult(_mean(difference), None, -_mean(student), num_tokens, exact=False)


def _mean(arrays: Sequence[Floats]) -> float:
    """Mean over all tokens; 0.0 when there is none."""
    total = sum(len(array) for array in arrays)
    return float(sum(array.sum() for array in arrays) / total) if total else 0.0
