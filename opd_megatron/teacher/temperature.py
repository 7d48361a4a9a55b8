"""A served teacher at another temperature than 1, from its whole distribution.

A server scores given tokens at temperature 1 (`serving/command.py`). At temperature tau

    log q_tau(v) = log q(v) / tau - log sum_u q(u)^(1/tau)

and the sum is over the whole vocabulary. So it is exact where the server sends all of it (K = vocabulary size), for the
sampled token as for the others. With less, the tail of mass m over n tokens, none likelier than the last listed one,
only bounds it: for tau > 1 its part of the sum lies between that of m / q_K tokens of probability q_K and n^(1 - 1/tau)
m^(1/tau); such scores are refused before a run starts (`launch/contracts.py`), and a teacher inside the learner takes
any temperature exactly.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from opd_megatron.errors import ContractError
from opd_megatron.serving.contract import ScoredResponse


def at_temperature(score: ScoredResponse, temperature: float, vocab_size: int) -> ScoredResponse:
    """The same score at another temperature.

    Args:
        score: at temperature 1, with every token of the vocabulary listed.

    Raises:
        ContractError: tokens are missing, so the normaliser is not known.
    """
    listed = 0 if score.topk_logprobs is None else score.topk_logprobs.shape[1]
    if score.topk_logprobs is None or listed != vocab_size:
        raise ContractError(
            f"teacher temperature {temperature}: {listed} of {vocab_size} tokens are listed, the normaliser "
            "needs all"
        )
    scaled_LV = score.topk_logprobs.astype(np.float64) / temperature
    # Likeliest first, so the first column is the largest.
    largest_L1 = scaled_LV[:, :1]
    log_sum_L1 = largest_L1 + np.log(np.exp(scaled_LV - largest_L1).sum(axis=1, keepdims=True))
    sampled_L = score.logprobs.astype(np.float64) / temperature - log_sum_L1[:, 0]
    return dataclasses.replace(
        score,
        logprobs=sampled_L.astype(np.float32),
        topk_logprobs=(scaled_LV - log_sum_L1).astype(np.float32),
    )
