"""Importance weights between the policy that sampled (rollout engine) and the learner.

With log-ratios d_t = log pi(y_t) - log mu(y_t), pi the learner and mu the behavior policy, both at
the rollout temperature, the ratio of a token is one of

    token           exp d_t
    sequence        exp sum_s d_s               over the kept tokens of its sequence
    geometric_mean  exp mean_s d_s              the sequence ratio per token

and its weight, bounds inclusive,

    none            1
    truncated       min(max(ratio, low), high)
    masked          ratio if low <= ratio <= high else 0        (IcePop)

Weights are constants of the loss: no gradient flows through them. Token ratios with open bounds
correct the choice of a token exactly, its prefix stays the behavior policy's; sequence ratios with
open bounds correct both and are what discounted returns need. Every finite bound, and the geometric
mean always, trade exactness for variance.

Sources: Ionides 2008 (truncated); IcePop, Ring-1T 2510.18855 (masked); GSPO 2507.18071 (geometric
mean).
"""

from __future__ import annotations

import torch

from opd_megatron.config.schema import CorrectionConfig
from opd_megatron.losses.sequences import Sequences

# exp(60) fits float32 with room for products and no finite threshold is beyond it; it bounds
# log-ratios so that a token that one side calls impossible stays an ordinary input.
MAX_LOG_RATIO = 60.0


def importance_weights(
    learner_logprobs_T: torch.Tensor, behavior_logprobs_T: torch.Tensor, config: CorrectionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-level weights and which tokens the bounds acted on.

    Args:
        learner_logprobs_T: [T] log pi of the sampled tokens.
        behavior_logprobs_T: [T] log mu, as recorded by the rollout engine.
        config: kind and bounds.

    Returns:
        weights [T], detached, and outside [T] bool: the ratio left [low, high] (never for `none`).
    """
    return bounded_weights((learner_logprobs_T - behavior_logprobs_T).detach(), config)


def bounded_weights(
    log_ratio_T: torch.Tensor, config: CorrectionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights from log-ratios of any level; arguments and result as in `importance_weights`."""
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.kind == "none":
        return torch.ones_like(ratio_T), torch.zeros_like(ratio_T, dtype=torch.bool)
    outside_T = (ratio_T < config.low) | (ratio_T > config.high)
    if config.kind == "truncated":
        return ratio_T.clamp(config.low, config.high), outside_T
    return torch.where(outside_T, torch.zeros_like(ratio_T), ratio_T), outside_T


def sequence_log_ratios(
    log_ratio_T: torch.Tensor, sequences: Sequences, *, per_token: bool
) -> torch.Tensor:
    """The log-ratio of a token's whole sequence, at every kept token; 0 elsewhere.

    Args:
        log_ratio_T: [T] of tokens.
        sequences: whole sequences; one cut across ranks has the wrong ratio.
        per_token: False for `sequence`, True for `geometric_mean`.

    Returns:
        [T], detached.
    """
    total_B = sequences.sum(log_ratio_T.detach())
    if per_token:
        total_B = total_B / sequences.lengths(total_B.dtype).clamp_min(1)
    return sequences.spread(total_B)
