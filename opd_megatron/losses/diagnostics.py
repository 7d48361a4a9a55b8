"""Metrics that survive any split of a batch: sums with their weights, and maxima.

A micro-batch returns `(sum, weight)` pairs and maxima as tensors; the learner adds the pairs over
micro-batches and ranks, takes the maxima, and calls `finish` once on the global values. A mean of
means can not happen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# The sums hold mean(behavior nll - learner nll); the metric is its exponential, a ratio of
# perplexities.
LOG_PPL_DRIFT = "offpolicy/log_ppl_drift"
PPL_DRIFT = "offpolicy/ppl_drift"


def finish(sums: Mapping[str, tuple[float, float]], maxes: Mapping[str, float]) -> dict[str, float]:
    """Global sums, weights and maxima to metrics; a mean of no tokens is 0.

    Args:
        sums: metric name -> (sum, weight), already added over micro-batches and ranks.
        maxes: metric name -> maximum, already taken over micro-batches and ranks.

    Returns:
        One float a metric.
    """
    metrics = {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}
    if LOG_PPL_DRIFT in metrics:
        drift = metrics.pop(LOG_PPL_DRIFT)
        # exp overflows beyond 709; a drift that large is reported as infinite rather than as an
        # error.
        metrics[PPL_DRIFT] = math.exp(drift) if drift < 700 else math.inf
    metrics.update(maxes)
    return metrics
