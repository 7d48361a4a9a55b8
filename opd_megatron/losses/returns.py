"""Returns: what a token is charged for the divergence of the tokens after it.

    A_t = -(f'(r_t) - f'(1)) - sum_{s > t} gamma^(s - t) c_s,        c_s = f(r_s) / r_s

The token itself is charged with the derivative, later tokens with an unbiased estimate c_s of their
divergence (E_pi[f(r)/r] = D_f). Only for reverse_kl are the two the same function, log r, and the
sum is the familiar discounted return-to-go; summing -f' for any other divergence has another
expected gradient.

    gamma = 0    every position descends its own divergence, prefixes as they come
    gamma = 1    the gradient of E_{y ~ pi} sum_t D_f(pi_t || q_t); reverse_kl: KL of sequences
    in between   at every prefix, the gradient of the discounted cost-to-go by the choice there

Exact on-policy; otherwise with sequence-level importance weights and open bounds.
"""

from __future__ import annotations

import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import check_shape
from opd_megatron.losses.sequences import Sequences


def _shifted(values_T: torch.Tensor, steps: int) -> torch.Tensor:
    """values[t + steps], 0 beyond the end."""
    result = torch.zeros_like(values_T)
    if steps < len(values_T):
        result[: len(values_T) - steps] = values_T[steps:]
    return result


def discounted_sum(values_T: torch.Tensor, sequences: Sequences, discount: float) -> torch.Tensor:
    """sum_{s >= t} discount^(s - t) values_s over the sequence of t, 0 at tokens without one.

    log2(T) steps, each doubling how far ahead a token sees. Positions are counted in kept tokens.
    """
    kept = sequences.kept_T
    total, ids = values_T[kept], sequences.ids_T[kept]
    if len(ids) > 1 and bool((ids[1:] < ids[:-1]).any()):
        order = ids.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
    else:
        order = back = torch.arange(len(ids), device=ids.device)
    total, ids = total[order], ids[order]
    steps, factor = 1, discount
    while steps < len(ids) and factor > 0.0:
        same = torch.zeros_like(ids, dtype=torch.bool)
        same[: len(ids) - steps] = ids[steps:] == ids[: len(ids) - steps]
        total = total + factor * torch.where(same, _shifted(total, steps), 0.0)
        steps, factor = 2 * steps, factor * factor
    result = torch.zeros_like(values_T)
    result[kept] = total[back]
    return result


def discounted_advantages(
    advantages_T: torch.Tensor, costs_T: torch.Tensor, sequences: Sequences, discount: float
) -> torch.Tensor:
    """The formula of the module docstring.

    Args:
        advantages_T: [T] -(f'(r) - f'(1)) of every token.
        costs_T: [T] f(r) / r of every token.
        sequences: whole sequences.
        discount: gamma in [0, 1].

    Returns:
        [T], 0 at tokens without a sequence.

    Raises:
        ConfigError: discount outside [0, 1].
        LossInputError: wrong shape.
    """
    if not 0.0 <= discount <= 1.0:
        raise ConfigError.of("objective.discount", discount, "must lie in [0, 1]", "choose one")
    num_tokens = sequences.ids_T.shape[0]
    check_shape("advantages_T", advantages_T, (num_tokens,))
    check_shape("costs_T", costs_T, (num_tokens,))
    # sum over s > t = sum over s >= t, less the token itself
    later_T = discounted_sum(costs_T, sequences, discount) - costs_T
    return torch.where(sequences.kept_T, advantages_T - later_T, torch.zeros_like(advantages_T))
