"""A learner hangs when no rank moves: neither one slow rank nor one long command is taken for that."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.errors import RoleDied
from opd_megatron.exchange.beats import RankBeat, RankWatch, last_beats


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def beat(folder: Path, rank: int, what: str, at_s: float) -> None:
    """A beat whose modification time does not depend on how fast this test runs."""
    RankBeat(folder, rank).mark(what)
    os.utime(folder / f"beat_{rank:04d}", (at_s, at_s))


def seconds_until_noticed(
    folder: Path, moving: dict[int, float], limit_s: float, until_s: float
) -> float | None:
    """Watch two ranks, of which some move every so many seconds; when the watch says that nobody does."""
    clock = Clock()
    for rank in (0, 1):
        beat(folder, rank, "micro-batch 1 of 2", 0.0)
    watch = RankWatch(folder, limit_s, clock)
    while clock.now < until_s:
        clock.now += 0.5
        for rank, every_s in moving.items():
            if clock.now % every_s == 0:
                beat(folder, rank, f"micro-batch at {clock.now}", clock.now)
        if watch.stand_still():
            return clock.now
    return None


def test_ranks_that_all_stand_still_are_noticed_after_the_limit(tmp_path: Path) -> None:
    noticed = seconds_until_noticed(tmp_path, {}, 10.0, 60.0)
    assert noticed is not None and 10.0 < noticed <= 12.0


def test_one_rank_that_moves_is_enough(tmp_path: Path) -> None:
    assert seconds_until_noticed(tmp_path, {1: 8.0}, 10.0, 60.0) is None


def test_beats_further_apart_than_the_limit_are_noticed(tmp_path: Path) -> None:
    noticed = seconds_until_noticed(tmp_path, {0: 30.0, 1: 30.0}, 10.0, 60.0)
    assert noticed is not None and noticed <= 12.0


def test_what_happened_before_the_command_does_not_count(tmp_path: Path) -> None:
    """Between two commands ranks wait for minutes, while rollouts are written."""
    clock = Clock()
    beat(tmp_path, 0, "waiting for command 2", 0.0)
    clock.now = 500.0
    watch = RankWatch(tmp_path, 10.0, clock)
    clock.now = 505.0
    assert not watch.stand_still()


def test_a_learner_without_beats_is_left_to_the_deadline(tmp_path: Path) -> None:
    clock = Clock()
    watch = RankWatch(tmp_path, 1.0, clock)
    clock.now = 100.0
    assert not watch.stand_still()


def test_the_rank_that_stopped_first_stands_in_front(tmp_path: Path) -> None:
    for rank, at in ((0, 1000.0), (1, 999.0), (2, 1001.0)):
        beat(tmp_path, rank, f"micro-batch {rank}", at)
    said = last_beats(tmp_path, shown=2)
    assert said.startswith("rank 1 last at 'micro-batch 1' ")
    assert "rank 0 last at 'micro-batch 0'" in said
    assert said.endswith("1 ranks later")


@pytest.mark.parametrize("kind", ["train", "save"])
def test_a_command_that_hangs_is_named_long_before_its_deadline(tmp_path: Path, kind: str) -> None:
    RankBeat(tmp_path, 0).mark("micro-batch 3 of 8")
    link = LearnerLink(tmp_path, 60.0, hang_timeout_s=0.5)
    with pytest.raises(RoleDied, match=f"hangs in '{kind}'.*rank 0 last at 'micro-batch 3 of 8'"):
        asyncio.run(link.ask(kind))


def test_a_command_that_waits_for_servers_has_its_deadline_only(tmp_path: Path) -> None:
    RankBeat(tmp_path, 0).mark("the start of send")
    link = LearnerLink(tmp_path, 1.5, hang_timeout_s=0.1)
    with pytest.raises(RoleDied, match=r"no answer to 'send' after 2 s .*'the start of send'"):
        asyncio.run(link.ask("send"))
