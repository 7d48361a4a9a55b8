"""The order of prompts is a pure function of (content hash, seed, epoch)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_megatron.data import order as order_module
from opd_megatron.data.order import AlternatingOrder, PromptOrder, permutation

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**31 - 1)


@given(sizes, seeds, st.integers(0, 5))
def test_every_epoch_shows_every_prompt_once(size: int, seed: int, epoch: int) -> None:
    order = PromptOrder("hash", seed, size, shuffle=True)
    positions = range(epoch * size, (epoch + 1) * size)
    seen = [order.index_at(position) for position in positions]
    assert {epoch_seen for epoch_seen, _ in seen} == {epoch}
    assert sorted(index for _, index in seen) == list(range(size))


@given(sizes, seeds, st.lists(st.integers(0, 2000), min_size=1, max_size=20))
def test_index_depends_on_the_position_alone(size: int, seed: int, positions: list[int]) -> None:
    used = PromptOrder("hash", seed, size, shuffle=True)
    answers = [used.index_at(position) for position in positions]
    fresh = [PromptOrder("hash", seed, size, True).index_at(position) for position in positions]
    assert answers == fresh


def test_prompts_of_two_epochs_side_by_side_cost_one_permutation_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counted(content_hash: str, seed: int, epoch: int, size: int) -> list[int]:
        made.append(epoch)
        return permutation(content_hash, seed, epoch, size)

    monkeypatch.setattr(order_module, "permutation", counted)
    order = PromptOrder("hash", 0, 10, shuffle=True)
    for offset in range(10):
        for epoch in (0, 1):
            order.index_at(epoch * 10 + offset)
    order.index_at(20)
    order.index_at(10)
    assert made == [0, 1, 2]


@given(sizes, seeds)
def test_without_shuffle_file_order_repeats(size: int, seed: int) -> None:
    order = PromptOrder("hash", seed, size, shuffle=False)
    assert [order.index_at(p) for p in range(2 * size)] == [
        divmod(p, size) for p in range(2 * size)
    ]


def test_hash_seed_and_epoch_each_change_the_order() -> None:
    orders = [permutation(*key, 50) for key in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))]
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_pinned_so_that_old_runs_resume_alike() -> None:
    assert permutation("content", 7, 3, 10) == PINNED


PINNED = [1, 7, 3, 5, 4, 0, 9, 2, 8, 6]


def test_first_place_is_uniform() -> None:
    counts = Counter(permutation("content", seed, 0, 8)[0] for seed in range(8000))
    # 1000 expected in each; 6 standard deviations are 178.
    assert all(822 < counts[index] < 1178 for index in range(8))


def test_domains_alternate_and_each_is_passed_in_its_own_order() -> None:
    domains = ["b", "a", None, "a", "b", "a"]
    order = AlternatingOrder("hash", 3, domains, shuffle=True)
    seen = [order.index_at(position) for position in range(18)]
    assert [domains[index] for _, index in seen[:3]] == [None, "a", "b"]
    assert [domains[index] for _, index in seen] == [None, "a", "b"] * 6
    first_pass = [index for epoch, index in seen[1::3] if epoch == 0]
    assert sorted(first_pass) == [1, 3, 5]
    assert [epoch for epoch, _ in seen[0::3]] == [0, 1, 2, 3, 4, 5]
    again = AlternatingOrder("hash", 3, domains, shuffle=True)
    assert [again.index_at(position) for position in reversed(range(18))] == seen[::-1]
