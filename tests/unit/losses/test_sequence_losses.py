"""Discounts, sequence weights, normalisation, clipping: proven over all sequences of a tree.

Three tokens, at most three steps, token 0 ends a sequence: 15 sequences over 7 prefixes. The policy
is a table of logits, one row a prefix, so expectations and their gradients are exact sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from enumeration import relative_error
from tree import SEQUENCES, Tree, declared_gradient, pack, table

from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.errors import ConfigError
from opd_megatron.losses.clipping import clipped_losses
from opd_megatron.losses.corrections import bounded_weights, sequence_log_ratios
from opd_megatron.losses.divergences import DIVERGENCES, Divergence, make_divergence
from opd_megatron.losses.estimators import policy_gradient, value_as_advantage
from opd_megatron.losses.normalization import token_weights
from opd_megatron.losses.returns import discounted_advantages, discounted_sum
from opd_megatron.losses.sequences import Sequences

OPEN = CorrectionConfig(kind="masked", low=0.0, high=math.inf)
DISCOUNTS = [0.0, 0.4, 1.0]


def sampled_gradient(
    divergence: Divergence,
    discount: float,
    student: torch.Tensor,
    teacher: torch.Tensor,
    behavior: torch.Tensor,
    weights: Callable[[Tree], torch.Tensor],
) -> torch.Tensor:
    """Expectation over the behavior policy of the gradient of -sum_t w A log pi."""
    logits = student.clone().requires_grad_()
    tree = pack(logits, teacher, behavior)
    log_r = (tree.student_T - tree.teacher_T).detach()
    advantages = discounted_advantages(
        policy_gradient(divergence)(log_r),
        -value_as_advantage(divergence)(log_r),
        tree.sequences,
        discount,
    )
    loss_T = -weights(tree) * advantages * tree.student_T
    (tree.sequences.sum(loss_T) * tree.probability_B.detach()).sum().backward()
    assert logits.grad is not None
    return logits.grad


def no_weights(tree: Tree) -> torch.Tensor:
    return torch.ones_like(tree.student_T).detach()


def token_ratios(tree: Tree) -> torch.Tensor:
    return bounded_weights((tree.student_T - tree.behavior_T).detach(), OPEN)[0]


def sequence_ratios(tree: Tree) -> torch.Tensor:
    log_ratio = tree.student_T - tree.behavior_T
    return bounded_weights(sequence_log_ratios(log_ratio, tree.sequences, per_token=False), OPEN)[0]


@pytest.fixture(params=list(DIVERGENCES))
def divergence(request: pytest.FixtureRequest) -> Divergence:
    return make_divergence(ObjectiveConfig(divergence=request.param))


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_on_policy_gradient_is_the_declared_one(divergence: Divergence, discount: float) -> None:
    student, teacher = table(0), table(1)
    seen = sampled_gradient(divergence, discount, student, teacher, student, no_weights)
    wanted = declared_gradient(divergence, discount, student, teacher, student)
    assert relative_error(seen, wanted) <= 1e-10


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_sequence_ratios_make_the_behavior_policy_exact(
    divergence: Divergence, discount: float
) -> None:
    student, teacher, behavior = table(0), table(1), table(2)
    seen = sampled_gradient(divergence, discount, student, teacher, behavior, sequence_ratios)
    wanted = declared_gradient(divergence, discount, student, teacher, student)
    assert relative_error(seen, wanted) <= 1e-10


def test_token_ratios_keep_the_prefixes_of_the_behavior_policy(divergence: Divergence) -> None:
    student, teacher, behavior = table(0), table(1), table(2)
    seen = sampled_gradient(divergence, 0.0, student, teacher, behavior, token_ratios)
    wanted = declared_gradient(divergence, 0.0, student, teacher, behavior)
    assert relative_error(seen, wanted) <= 1e-10


def test_token_ratios_are_not_exact_with_a_discount() -> None:
    student, teacher, behavior = table(0), table(1), table(2)
    reverse_kl = make_divergence(ObjectiveConfig())
    seen = sampled_gradient(reverse_kl, 1.0, student, teacher, behavior, token_ratios)
    for prefixes in (student, behavior):
        wanted = declared_gradient(reverse_kl, 1.0, student, teacher, prefixes)
        assert relative_error(seen, wanted) > 0.01


def test_undiscounted_reverse_kl_is_the_kl_of_whole_sequences() -> None:
    student, teacher = table(0), table(1)
    logits = student.clone().requires_grad_()
    tree = pack(logits, teacher, student)
    log_p, log_q = tree.sequences.sum(tree.student_T), tree.sequences.sum(tree.teacher_T)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    assert logits.grad is not None
    reverse_kl = make_divergence(ObjectiveConfig())
    seen = sampled_gradient(reverse_kl, 1.0, student, teacher, student, no_weights)
    assert relative_error(seen, logits.grad) <= 1e-10


def test_discounted_sum_equals_the_recursion() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=generator, dtype=torch.float64)
    ids = torch.tensor([-1] * 3 + [2] * 9 + [0] + [-1] * 2 + [1] * 17 + [4] * 8)
    wanted = torch.zeros(40, dtype=torch.float64)
    for t in reversed(range(40)):
        later = [s for s in range(t + 1, 40) if ids[s] == ids[t]]
        if ids[t] >= 0:
            wanted[t] = values[t] + (0.7 * wanted[later[0]] if later else 0.0)
    seen = discounted_sum(values, Sequences(ids, 5), 0.7)
    torch.testing.assert_close(seen, wanted)
    shuffled = torch.cat([torch.arange(20, 40), torch.arange(20)])  # ids no longer ascending
    seen = discounted_sum(values[shuffled], Sequences(ids[shuffled], 5), 0.0)
    torch.testing.assert_close(seen, torch.where(ids[shuffled] >= 0, values[shuffled], 0.0))


def test_geometric_mean_is_the_sequence_ratio_per_token() -> None:
    tree = pack(table(0), table(1), table(2))
    d = tree.student_T - tree.behavior_T
    mean = sequence_log_ratios(d, tree.sequences, per_token=True)
    for b, sequence in enumerate(SEQUENCES):
        own = tree.sequences.ids_T == b
        assert float(mean[own][0]) == pytest.approx(float(d[own].sum()) / len(sequence))


def test_sequence_mean_weighs_every_response_the_same() -> None:
    sequences = Sequences(torch.tensor([-1, 0, 0, 0, -1, 2, 2]), 3)  # response 1 is empty
    weights, divisor = token_weights(sequences, "sequence_mean")
    assert weights.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 0.5, 0.5])
    assert float(divisor) == 2.0
    weights, divisor = token_weights(sequences, "token_mean")
    assert weights.tolist() == [0, 1, 1, 1, 0, 1, 1] and float(divisor) == 5.0


def test_clipping_is_free_at_ratio_one_and_stops_beyond_the_bound() -> None:
    old = torch.zeros(5, dtype=torch.float64)
    student = torch.log(torch.tensor([1.0, 1.3, 1.3, 0.7, 0.7], dtype=torch.float64))
    student.requires_grad_()
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0], dtype=torch.float64)
    losses, clipped = clipped_losses(student, old, advantages, 0.2, 0.2)
    losses.sum().backward()
    assert clipped.tolist() == [False, True, False, True, False]
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx([-2.0, 0.0, 2.6, 0.0, -1.4])


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_a_discount_outside_zero_and_one_is_refused(bad: float) -> None:
    tree = pack(table(0), table(1), table(2))
    with pytest.raises(ConfigError, match="discount"):
        discounted_advantages(tree.student_T, tree.student_T, tree.sequences, bad)
    with pytest.raises(ConfigError, match="clip bounds"):
        clipped_losses(tree.student_T, tree.student_T, tree.student_T, 1.0, 0.2)
    with pytest.raises(ConfigError, match="token_mean"):
        token_weights(tree.sequences, "mean")
