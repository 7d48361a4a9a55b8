"""Waiting is never silent."""

from __future__ import annotations

import asyncio

import pytest

from opd_megatron.observe.waiting import WaitClock, WaitNotice


def test_a_notice_is_due_every_thirty_seconds() -> None:
    now = [0.0]
    wait = WaitClock("the answer to 'train' of step 12", "learner", 1800, clock=lambda: now[0])
    said = []
    for second in range(100):
        now[0] = float(second)
        notice = wait.due()
        if notice:
            said.append((second, notice))
    assert [second for second, _ in said] == [30, 60, 90]
    assert said[1][1] == (
        "waiting 1m00s for the answer to 'train' of step 12, on learner, gives up after 30m00s"
    )


def test_on_whom_is_asked_again_for_every_notice() -> None:
    now, missing = [0.0], ["a", "b"]
    wait = WaitClock("scores", lambda: f"teacher-main-0: {len(missing)} left", clock=lambda: now[0])
    now[0] = 31.0
    assert wait.due() == "waiting 31s for scores, on teacher-main-0: 2 left"
    missing.pop()
    now[0] = 62.0
    assert wait.due() == "waiting 1m02s for scores, on teacher-main-0: 1 left"


def test_the_context_manager_speaks_while_its_body_waits_and_then_stops() -> None:
    said: list[str] = []

    async def run() -> int:
        async with WaitNotice("rollouts", "rollout-0", said.append, every_s=0.02):
            await asyncio.sleep(0.15)
        spoken = len(said)
        await asyncio.sleep(0.06)
        return spoken

    spoken = asyncio.run(run())
    assert spoken >= 2 and len(said) == spoken
    assert all("for rollouts, on rollout-0" in line for line in said)


def test_a_short_wait_is_silent() -> None:
    said: list[str] = []

    async def run() -> None:
        async with WaitNotice("rollouts", "rollout-0", said.append):
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert said == []


def test_errors_of_the_body_and_of_the_notice_are_not_swallowed() -> None:
    def broken() -> str:
        raise KeyError("pool")

    async def body_fails() -> None:
        async with WaitNotice("rollouts", "rollout-0", print):
            raise TimeoutError("too long")

    async def notice_fails() -> None:
        async with WaitNotice("rollouts", broken, print, every_s=0.01):
            await asyncio.sleep(0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(body_fails())
    with pytest.raises(KeyError):
        asyncio.run(notice_fails())
