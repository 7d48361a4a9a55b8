"""Several served teachers as one: their log-probs at the same tokens become those of their mean.

    arithmetic_mean   log q(v) = logsumexp_m(log w_m + log q_m(v))          exact at every token all members scored
    geometric_mean    log q(v) = sum_m w_m log q_m(v) - log Z,   Z = sum_v prod_m q_m(v)^w_m

Z needs the whole vocabulary. From a set S that all members scored it is bounded, with r_m = 1 - sum_S q_m and Hoelder's
inequality on the rest:

    Z_S <= Z <= Z_S + prod_m r_m^w_m

The middle of the two (in logs) is taken, and half their distance is how far a log-prob can be off: 0 when S is
the vocabulary. Within one position the error is one constant, so for the reverse KL from sampled tokens it is a
baseline and leaves the expected gradient exact.

Shape suffixes: M teachers, L positions, J tokens of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# As a rest: what float32 log-probs of a whole vocabulary may miss of 1 by rounding.
_ROUNDING = 1e-6
# Stands for -inf, of which numpy's products make NaN; exp of it is 0.
_IMPOSSIBLE = -1e30

# Less than this is no distribution's overlap but a sign that nothing is known.
_LEAST_LOG_Z = -700.0


@dataclass(frozen=True)
class Mixed:
    """The mean at some tokens.

    logprobs_LJ: [L, J]. sampled_L: [L], of the sampled token. error_L: [L] nats by which every log-prob of
    the position may be off, all in the same direction by the same amount. low_log_z_L: [L] lower bound on log Z.
    """

    logprobs_LJ: Floats
    sampled_L: Floats
    error_L: Floats
    low_log_z_L: Floats


def mix(
    mean: str,
    weights: Sequence[float],
    logprobs_MLJ: Floats,
    sampled_ML: Floats,
    valid_LJ: NDArray[np.bool_],
) -> Mixed:
    """The mean of M teachers.

    Args:
        mean: `arithmetic_mean` or `geometric_mean`.
        weights: [M] above 0, of sum 1.
        logprobs_MLJ: [M, L, J] of each teacher at the same tokens, each token once a position.
        sampled_ML: [M, L] of the sampled token, which need not be among them.
        valid_LJ: [L, J]; what is not valid has no token and comes back as -inf.
    """
    log_w_M = np.log(np.asarray(weights, dtype=np.float64))
    listed_MLJ = np.where(valid_LJ, logprobs_MLJ, -np.inf)
    if mean == "arithmetic_mean":
        return Mixed(
            _logsumexp(listed_MLJ + log_w_M[:, None, None], axis=0),
            _logsumexp(sampled_ML + log_w_M[:, None], axis=0),
            np.zeros(sampled_ML.shape[1]),
            np.zeros(sampled_ML.shape[1]),
        )
    assert mean == "geometric_mean", mean
    weights_M = np.exp(log_w_M)
    unscaled_LJ = np.where(valid_LJ, _weighted_sum(weights_M, listed_MLJ), -np.inf)
    sampled_L = _weighted_sum(weights_M, sampled_ML)
    low_L, high_L = _bounds_on_log_z(weights_M, listed_MLJ, unscaled_LJ, sampled_L)
    log_z_L = (low_L + high_L) / 2.0
    return Mixed(
        np.minimum(unscaled_LJ - log_z_L[:, None], 0.0),
        np.minimum(sampled_L - log_z_L, 0.0),
        (high_L - low_L) / 2.0,
        low_L,
    )


def _bounds_on_log_z(
    weights_M: Floats, listed_MLJ: Floats, unscaled_LJ: Floats, sampled_L: Floats
) -> tuple[Floats, Floats]:
    """[L] each, low and high."""
    rest_ML = np.maximum(1.0 - np.exp(listed_MLJ).sum(axis=2), 0.0)
    rest_ML = np.where(rest_ML > _ROUNDING, rest_ML, 0.0)
    # Every member scored the sampled token, whatever else.
    low_L = np.maximum(_logsumexp(unscaled_LJ, axis=1), sampled_L).clip(min=_LEAST_LOG_Z, max=0.0)
    with np.errstate(divide="ignore"):
        rest_L = _weighted_sum(weights_M, np.log(rest_ML))
    # Z of distributions never exceeds 1 (Hoelder, over the whole vocabulary).
    high_L = np.minimum(np.logaddexp(low_L, rest_L), 0.0)
    return low_L, np.maximum(high_L, low_L)


def _weighted_sum(weights_M: Floats, values: Floats) -> Floats:
    """sum_m w_m x_m over the first axis; impossible for one member is impossible for their mean."""
    return np.tensordot(weights_M, np.maximum(values, _IMPOSSIBLE), axes=1)


def _logsumexp(values: Floats, axis: int) -> Floats:
    """Without a warning where everything is -inf."""
    top = np.max(values, axis=axis, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.squeeze(safe, axis) + np.log(np.exp(values - safe).sum(axis=axis))
