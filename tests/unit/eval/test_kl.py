"""KL and entropy from log-probs over a vocabulary, against plain sums and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from opd_megatron.eval.kl import (
    dense_logprobs,
    entropy_per_position,
    exact_kl_result,
    kl_per_position,
    sampled_kl_result,
)


def random_logprobs(seed: int, length: int = 7, vocab_size: int = 32) -> NDArray[np.float64]:
    logits = np.random.default_rng(seed).normal(size=(length, vocab_size)) * 3
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def log(*probabilities: float) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(np.array([probabilities]))


def test_kl_and_entropy_match_torch() -> None:
    student, teacher = random_logprobs(0), random_logprobs(1)
    p, q = torch.from_numpy(student), torch.from_numpy(teacher)
    # torch's kl_div(input, target) is KL(target || input).
    reverse = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    forward = torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    entropy = torch.distributions.Categorical(logits=p).entropy()
    np.testing.assert_allclose(kl_per_position(student, teacher), reverse.numpy(), rtol=1e-12)
    np.testing.assert_allclose(kl_per_position(teacher, student), forward.numpy(), rtol=1e-12)
    np.testing.assert_allclose(entropy_per_position(student), entropy.numpy(), rtol=1e-12)


def test_direction_of_reverse_and_forward() -> None:
    student, teacher = log(0.5, 0.5), log(0.9, 0.1)
    result = exact_kl_result([(student, teacher)])
    assert result.reverse == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert result.forward == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert result.entropy == pytest.approx(math.log(2))


def test_equal_models_have_zero_kl_even_with_impossible_tokens() -> None:
    same = log(0.25, 0.75, 0.0)
    assert kl_per_position(same, same).tolist() == [0.0]
    assert entropy_per_position(same)[0] == pytest.approx(0.5623351446)


def test_zero_weight_terms_vanish_and_missing_support_is_infinite() -> None:
    narrow, wide = log(1.0, 0.0), log(0.5, 0.5)
    assert kl_per_position(narrow, wide)[0] == pytest.approx(math.log(2))
    assert kl_per_position(wide, narrow)[0] == math.inf


def test_dense_layout_undoes_any_order_of_the_listed_tokens() -> None:
    logprobs = random_logprobs(2, length=4, vocab_size=6)
    order = np.argsort(-logprobs, axis=1)
    listed = np.take_along_axis(logprobs, order, axis=1)
    np.testing.assert_array_equal(dense_logprobs(order.astype(np.int32), listed, 6), logprobs)


def test_tokens_that_are_not_listed_count_as_impossible() -> None:
    dense = dense_logprobs(np.array([[2, 0]]), np.array([[-0.1, -2.4]]), 4)
    assert dense.tolist() == [[-2.4, -math.inf, -0.1, -math.inf]]


def test_mean_is_over_tokens_not_over_responses() -> None:
    equal, apart = (log(0.5, 0.5),) * 2, (log(1.0, 0.0), log(0.5, 0.5))
    longer = tuple(np.repeat(array, 3, axis=0) for array in apart)
    empty = (np.zeros((0, 2)),) * 2
    result = exact_kl_result([equal, longer, empty])  # type: ignore[list-item]
    assert result.num_tokens == 4
    assert result.reverse == pytest.approx(0.75 * math.log(2))


def test_no_tokens_give_zero_not_nan() -> None:
    assert exact_kl_result([]).reverse == 0.0
    assert sampled_kl_result([]).num_tokens == 0


def test_sampled_estimate_says_so_and_averages_to_the_exact_kl() -> None:
    student, teacher = random_logprobs(3, 1), random_logprobs(4, 1)
    rng = np.random.default_rng(0)
    tokens = rng.choice(32, size=200_000, p=np.exp(student[0]))
    result = sampled_kl_result([(student[0, tokens], teacher[0, tokens])])
    exact = exact_kl_result([(student, teacher)])
    spread = (student - teacher)[0, tokens].std() / math.sqrt(len(tokens))
    assert (result.exact, result.forward, exact.exact) == (False, None, True)
    assert abs(result.reverse - exact.reverse) < 5 * spread
    assert result.entropy == pytest.approx(exact.entropy, rel=0.02)
