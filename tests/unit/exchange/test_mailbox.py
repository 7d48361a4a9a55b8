"""How often the two sides of the mailbox look for each other's files."""

from __future__ import annotations

import pytest

from opd_megatron.exchange import mailbox


@pytest.mark.parametrize("comes_after_s", [0.0, 0.003, 0.4, 3.0, 3600.0])
def test_what_comes_is_seen_soon_and_a_long_wait_asks_seldom(comes_after_s: float) -> None:
    now, looks = 0.0, 0
    while now < comes_after_s:
        now += mailbox.pause_s(now)
        looks += 1
    assert now - comes_after_s <= max(0.002, min(0.02 * comes_after_s, 0.1)) + 1e-9
    assert looks <= 10 * comes_after_s + 250
