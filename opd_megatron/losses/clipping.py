"""PPO-style clipping, for more than one update on a batch.

    loss_t = -min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t),     rho_t = pi(y_t) / pi_old(y_t)

pi_old is the learner at the start of the batch (not the rollout engine: that ratio is a correction,
see corrections.py, and multiplies as a constant). At rho = 1 the gradient is that of -A log pi.
Beyond the bound on the side that A pushes to, the gradient of the token is 0.

Source: PPO, 1707.06347; different bounds on the two sides: DAPO, 2503.14476.
"""

from __future__ import annotations

import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.corrections import MAX_LOG_RATIO


def clipped_losses(
    student_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    low: float,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every token, and where clipping took its gradient away.

    Args:
        student_logprobs_T: [T] log pi of the sampled tokens, carries the gradient.
        old_logprobs_T: [T] log pi_old.
        advantages_T: [T], constants.
        low, high: distances of the bounds from 1; low in [0, 1), high >= 0.

    Returns:
        [T] losses and [T] bool.

    Raises:
        ConfigError: bounds that exclude 1.
    """
    if not 0.0 <= low < 1.0 or high < 0.0:
        raise ConfigError.of(
            "clip bounds", (low, high), "must satisfy 0 <= low < 1 and high >= 0", "e.g. (0.2, 0.2)"
        )
    advantages_T = advantages_T.detach()
    log_rho_T = (student_logprobs_T - old_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho_T = log_rho_T.exp()
    free_T = rho_T * advantages_T
    bounded_T = rho_T.clamp(1.0 - low, 1.0 + high) * advantages_T
    return -torch.minimum(free_T, bounded_T), (bounded_T < free_T).detach()
