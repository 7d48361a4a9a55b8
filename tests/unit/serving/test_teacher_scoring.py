"""How rollouts are spread over teachers and servers, and what a failing server does to the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.errors import ConfigError, OpdError, RequestRefused
from opd_megatron.serving.contract import ScoredResponse
from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.scoring import score_rollouts
from opd_megatron.types import Rollout


class SlowServer:
    """Scores a response with the sum of its ids after a pause, or fails."""

    def __init__(
        self, pause_s: float = 0.0, failure: OpdError | None = None, name: str = "teacher-0"
    ) -> None:
        self.name = name
        self.pause_s = pause_s
        self.failure = failure
        self.calls: list[list[tuple[int, ...]]] = []
        self.finished = 0

    async def score(self, sequences: Sequence[Any], topk: int = 0) -> list[ScoredResponse]:
        self.calls.append([prompt for prompt, _ in sequences])
        await asyncio.sleep(self.pause_s)
        if self.failure is not None:
            raise self.failure
        self.finished += 1
        return [
            ScoredResponse(np.full(len(response), -sum(response), np.float32), 0)
            for _, response in sequences
        ]


def rollout(number: int, prompt: tuple[int, ...]) -> Rollout:
    nothing = np.zeros(2, np.float32)
    return Rollout(f"s{number}", "p", prompt, (number, 1), nothing, "stop", 0, 0, "rollout-0")


def score(teachers: Any, rollouts: list[Rollout], routes: list[str], per_call: int) -> Any:
    async def run() -> Any:
        pools: dict[str, ServerPool] = {}
        for name, servers in teachers.items():
            pools[name] = ServerPool(name, servers, return_timeout_s=1.0, say=print)
            for server in servers:
                pools[name].admit(server, 0)
        return await score_rollouts(pools, rollouts, routes, sequences_per_call=per_call)

    return asyncio.run(run())


def test_results_keep_the_order_and_samples_of_a_prompt_share_a_call() -> None:
    server = SlowServer()
    prompts = [(1,), (2,), (1,), (2,)]
    rollouts = [rollout(number, prompt) for number, prompt in enumerate(prompts)]
    scores = score({"main": [server]}, rollouts, ["main"] * 4, per_call=2)
    assert [float(one.sampled_logprobs[0]) for one in scores] == [-1.0, -2.0, -3.0, -4.0]
    assert server.calls == [[(1,), (1,)], [(2,), (2,)]]


def test_every_rollout_goes_to_the_teacher_of_its_route() -> None:
    math, code = SlowServer(), SlowServer()
    rollouts = [rollout(number, (number,)) for number in range(3)]
    scores = score({"math": [math], "code": [code]}, rollouts, ["math", "code", "math"], 8)
    assert [one.teacher for one in scores] == ["math", "code", "math"]
    assert math.calls == [[(0,), (2,)]]
    assert code.calls == [[(1,)]]


def test_calls_spread_over_the_servers_of_a_teacher() -> None:
    servers = [SlowServer(0.01, name=f"teacher-{number}") for number in range(2)]
    rollouts = [rollout(number, (number,)) for number in range(8)]
    score({"main": servers}, rollouts, ["main"] * 8, per_call=1)
    assert [len(server.calls) for server in servers] == [4, 4]


def test_a_failed_call_is_raised_as_it_is_and_ends_the_others() -> None:
    broken, slow = SlowServer(failure=RequestRefused("too long")), SlowServer(pause_s=5.0)
    rollouts = [rollout(number, (number,)) for number in range(2)]
    with pytest.raises(RequestRefused, match="too long"):
        score({"a": [broken], "b": [slow]}, rollouts, ["a", "b"], 8)
    assert slow.calls
    assert slow.finished == 0


def test_an_unknown_teacher_is_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"teacher='maths' of rollout s0.*did you mean 'math'"):
        score({"math": [SlowServer()]}, [rollout(0, (1,))], ["maths"], 8)


def test_no_rollouts_need_no_call() -> None:
    assert score({"main": [SlowServer()]}, [], [], 8) == []
