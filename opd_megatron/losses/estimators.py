"""What multiplies -log pi(y) of a sampled token: the advantage A(l), l = log(pi(y) / q(y)).

With y ~ pi the expected gradient of the loss -A(l) log pi(y) is -E_pi[A grad log pi].
`policy_gradient` takes A = -f'(r), which makes it grad D_f(pi || q) exactly. The others exist
because the literature and other code use them; the right column is what each really descends. Where
that is not the divergence the recipe names, the estimator is biased and the recipe must say
`allow_biased`.

    policy_gradient     A = -f'(r)           D_f: proven for every divergence
    value_as_advantage  A = -f(r) / r        D_g with r g'(r) = f(r); for reverse_kl D_f itself, k1
    k2_as_advantage     A = -l^2 / 2         E_pi[l^2 / 2 - l + 1]
    k3_as_advantage     A = -(1/r - 1 + l)   KL(pi || q) - KL(q || pi)
    k2_differentiated   A = -l               KL(pi || q): grad(l^2 / 2) = l grad log pi, as k1
    k3_differentiated   A = 1/r - 1          KL(q || pi): grad(1/r - 1 + l) = (1 - 1/r) grad log pi
    cross_entropy       A = 1, y ~ data      KL(data || pi): E_data[-log pi] without the data's entropy

f(r)/r, l^2/2 and 1/r - 1 + l are fine estimates of a divergence's VALUE (Schulman 2020,
"Approximating KL divergence"); the bias comes from using them in place of its derivative. k1
differentiated directly is not here: its expected gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from opd_megatron.losses.divergences import Divergence
from opd_megatron.registry import Registry

# log(pi / q) of sampled tokens -> advantage, the same shape and dtype; nats for the KLs, else no unit.
Advantage = Callable[[torch.Tensor], torch.Tensor]

ESTIMATORS: Registry[Callable[[Divergence], Advantage]] = Registry("estimator")


@ESTIMATORS.register("policy_gradient")
def policy_gradient(divergence: Divergence) -> Advantage:
    """A = -(f'(r) - f'(1)); its expected gradient is that of D_f. Source: docs/losses.md, from Csiszar 1967."""
    return lambda log_r: -divergence.derivative(log_r)


@ESTIMATORS.register("value_as_advantage")
def value_as_advantage(divergence: Divergence) -> Advantage:
    """A = -f(r) / r, which averages to -D_f under the student but has another gradient."""
    if divergence.name == "reverse_kl":
        return lambda log_r: -log_r

    def advantage(log_r: torch.Tensor) -> torch.Tensor:
        # f reaches e^120 at the bound of the log-ratio, beyond float32; f / r does not.
        wide = log_r.double()
        return (-divergence.f(wide) * (-wide).exp()).to(log_r.dtype)

    return advantage


@ESTIMATORS.register("k2_as_advantage")
def k2_as_advantage(_: Divergence) -> Advantage:
    """A = -l^2 / 2, k2 as if it were an advantage: descends E_pi[l^2 / 2 - l + 1]. Source of k2: Schulman 2020."""
    return lambda log_r: -0.5 * log_r.square()


@ESTIMATORS.register("k3_as_advantage")
def k3_as_advantage(_: Divergence) -> Advantage:
    """A = -(1/r - 1 + l), k3 as if it were an advantage: descends KL(pi || q) - KL(q || pi). Source of k3: Schulman
    2020.
    """
    return lambda log_r: -(torch.expm1(-log_r) + log_r)


@ESTIMATORS.register("k2_differentiated")
def k2_differentiated(_: Divergence) -> Advantage:
    """A = -l: backpropagating k2 = l^2 / 2 descends KL(pi || q), as k1 does. Source of k2: Schulman 2020."""
    return lambda log_r: -log_r


@ESTIMATORS.register("k3_differentiated")
def k3_differentiated(_: Divergence) -> Advantage:
    """A = 1/r - 1: backpropagating k3 = 1/r - 1 + l descends KL(q || pi). Source of k3: Schulman 2020."""
    return lambda log_r: torch.expm1(-log_r)


@ESTIMATORS.register("cross_entropy")
def cross_entropy(_: Divergence) -> Advantage:
    """A = 1 at tokens that the data gives: the loss is their negative log-likelihood."""
    return torch.ones_like
