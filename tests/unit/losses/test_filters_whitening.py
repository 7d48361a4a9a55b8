"""Percentile windows and whitening: exact, order-free, and safe on degenerate batches."""

from __future__ import annotations

import math

import pytest
import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.filters import gather_scores, percentile_window
from opd_megatron.losses.sequences import Sequences
from opd_megatron.losses.whitening import whiten


def window(scores: torch.Tensor, kept: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return percentile_window(scores, kept, gather_scores(scores, kept, None), low, high)


def test_windows_split_a_batch_without_rest() -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    kept = scores > 0.1
    parts = [window(scores, kept, a, b) for a, b in ((0, 30), (30, 70), (70, 100))]
    assert torch.equal(torch.stack(parts).sum(0), kept.int())
    first, second = (math.ceil(x * int(kept.sum())) for x in (0.3, 0.7))
    assert [int(p.sum()) for p in parts] == [first, second - first, int(kept.sum()) - second]
    assert float(scores[parts[0]].max()) < float(scores[parts[1]].min())


def test_equal_scores_share_their_fate() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])
    kept = torch.ones(5, dtype=torch.bool)
    assert window(scores, kept, 0, 30).tolist() == [True] * 4 + [False]
    assert not window(scores, kept, 30, 70).any()


def test_the_mask_does_not_depend_on_order() -> None:
    scores = torch.randint(0, 20, (300,), generator=torch.Generator().manual_seed(1)).float()
    kept = torch.ones(300, dtype=torch.bool)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    assert torch.equal(window(scores, kept, 20, 55)[order], window(scores[order], kept, 20, 55))


def test_infinite_scores_and_empty_batches_are_ordinary() -> None:
    scores = torch.tensor([math.inf, 0.0, -math.inf])
    kept = torch.ones(3, dtype=torch.bool)
    assert window(scores, kept, 0, 100).all()
    assert window(scores, kept, 50, 100).tolist() == [True, False, False]
    assert not window(scores, ~kept, 0, 100).any()
    assert window(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0, 30).shape == (0,)


def test_bad_windows_and_nan_scores_are_refused() -> None:
    scores, kept = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    for low, high in ((30, 30), (-1, 50), (50, 101), (70, 30)):
        with pytest.raises(ConfigError, match="filter window"):
            window(scores, kept, low, high)
    with pytest.raises(LossInputError, match="scores_T"):
        window(torch.full((3,), math.nan), kept, 0, 30)
    assert not window(torch.full((3,), math.nan), ~kept, 0, 30).any()


def test_whitened_sets_have_mean_zero_and_unit_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, generator=generator, dtype=torch.float64) * 5 + 7
    sets = Sequences(torch.randint(-1, 3, (60,), generator=generator), 4)  # set 3 is empty
    whitened, found = whiten(values, sets)
    for number in range(3):
        own = sets.ids_T == number
        assert float(whitened[own].mean()) == pytest.approx(0.0, abs=1e-12)
        assert float(whitened[own].std(correction=0)) == pytest.approx(1.0)
        assert float(found.mean_B[number]) == pytest.approx(float(values[own].mean()))
    assert not whitened[sets.ids_T < 0].any()
    assert float(found.std_B[3]) == 0.0


def test_a_set_without_spread_becomes_zero_not_noise() -> None:
    values = torch.full((4,), 1e4) + torch.tensor([0.0, 1e-3, 0.0, 0.0])
    assert not whiten(values, Sequences(torch.zeros(4, dtype=torch.long), 1))[0].any()
    assert not whiten(values[:1], Sequences(torch.zeros(1, dtype=torch.long), 1))[0].any()
