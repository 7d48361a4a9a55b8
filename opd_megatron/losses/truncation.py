"""Rollouts drawn with top-p, top-k or min-p: what is then descended, exactly.

At one position truncation keeps a set S of tokens, and the rollout engine draws from

    mu(y) = pi'(y) / Z  for y in S, else 0,     Z = sum_S pi'(v)

with pi' the engine's softmax at the rollout temperature. The true weight of a sampled token is

    pi(y) / mu(y) = [pi(y) / pi'(y)] Z

The first factor is how far two engines disagree about one token; the bounds of `correction` act on it, so where the
engines agree nothing is masked, however small Z is. Z belongs to the position, is known exactly from the two log-probs
that the server states (`serving/kept_mass.py`) and multiplies the sampled-token term, with `correction.kind=none` too.
An expectation under mu covers S alone. With the centered advantage A = -(f'(r) - f'(1)), r = pi / q,

    E_mu[ (pi/mu) A grad log pi ] = -grad sum_S [ q f(pi/q) - f'(1) (pi - q) ]        S held fixed

which is the divergence on S in the measure `generalized` of `support_matching.py`: never negative, 0 only for pi = q on
S. Tokens outside S move through the softmax alone; S itself is not differentiated. Three things follow.

* A divergence over a support is a function of the position, not of the token that was drawn. E_mu of the first factor
  is 1, so it is not multiplied by Z and descends what it says.
* What needs sum_v grad pi(v) = 0 is not available: over S that sum is grad pi(S). A later cost or a reward, whose
  constant part cancels without truncation, here pushes probability out of S or into it. Both are refused
  (`combinations.py`) unless `objective.allow_biased`.
* Prefixes are those of truncated sampling, as the correction's levels already say of the engine's.

Renormalising the student and the teacher to S would be another objective; it needs their mass on S and is left out.
Proof by enumeration: tests/unit/losses/test_truncation.py.
"""

from __future__ import annotations

import torch


def kept_mass(kept_logmass_N: torch.Tensor) -> torch.Tensor:
    """Z of every token's position, in (0, 1].

    Args:
        kept_logmass_N: [N] log pi'(y) - log mu(y), as the server states both.

    Returns:
        [N]; rounding above 1 is cut.
    """
    return kept_logmass_N.clamp_max(0.0).exp()
