"""The arithmetic of versions, against brute force."""

from __future__ import annotations

import itertools

import pytest

from opd_megatron.controller.window import Window


def some_order_keeps_the_bound(window: Window, next_step: int, versions: tuple[int, ...]) -> bool:
    """Whether any order of training, `size` groups a step, trains every group by its deadline."""
    return any(
        all(
            next_step + place // window.size <= window.deadline(version)
            for place, version in enumerate(order)
        )
        for order in itertools.permutations(versions)
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_feasible_is_what_some_order_can_keep(size: int, staleness: int) -> None:
    window = Window(size, staleness)
    for versions in itertools.product(range(3), repeat=4):
        wanted = some_order_keeps_the_bound(window, 2, versions)
        assert window.is_feasible(2, sorted(versions)) == wanted, versions


def test_strictly_on_policy_there_is_room_for_one_step_and_none_while_it_trains() -> None:
    window = Window(size=4)
    assert window.room(held=7, next_step=8, last_step=20, waiting=0) == 4
    assert window.room(held=7, next_step=8, last_step=20, waiting=3) == 1
    assert window.room(held=7, next_step=9, last_step=20, waiting=0) == 0


def test_with_a_bound_there_is_room_for_as_many_steps_more() -> None:
    window = Window(size=4, max_staleness=2)
    assert window.room(held=7, next_step=8, last_step=20, waiting=0) == 12
    assert window.room(held=7, next_step=9, last_step=20, waiting=0) == 8
    assert window.room(held=7, next_step=9, last_step=9, waiting=0) == 4
    assert Window(4, 2, ahead=4).room(held=7, next_step=9, last_step=20, waiting=1) == 3


def test_a_step_waits_for_a_slow_group_only_when_that_would_be_too_old_afterwards() -> None:
    window = Window(size=2, max_staleness=1)
    # Step 2 trains version 1. What version 1 wrote may still wait, what version 0 wrote may not.
    assert window.choose(2, {4: 1, 5: 1}, others=[1]) == (4, 5)
    assert window.choose(2, {4: 1, 5: 1}, others=[0]) is None
    assert window.choose(2, {3: 0, 4: 1, 5: 1}, others=[]) == (3, 4)


def test_two_steps_worth_of_slow_groups_hold_back_a_step_before_the_last_moment() -> None:
    window = Window(size=2, max_staleness=2)
    # Four groups of version 0 may train in steps 2 and 3 alone, two in each.
    assert window.choose(2, {6: 1, 7: 1}, others=[0, 0, 0, 0]) is None
    assert window.choose(2, {6: 1, 7: 1}, others=[0, 0]) == (6, 7)
