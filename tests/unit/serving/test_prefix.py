"""Which prompts go out before their group, and that they do."""

from __future__ import annotations

import json

import pytest
from aiohttp import web
from test_serving_transport import KEYS, against

from opd_megatron.errors import ServerError
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.prefix import MAX_PROMPT_TOKENS, MIN_REPEATED_TOKENS, to_read_first
from opd_megatron.serving.requests import Sampling


def prompt_of(length: int, first: int = 3) -> tuple[int, ...]:
    return (first, *[4] * (length - 1))


def group(length: int, response: int, size: int = 8, first: int = 3) -> list:
    return [(prompt_of(length, first), (5,) * response)] * size


def test_a_prompt_goes_first_when_enough_of_it_would_be_computed_again() -> None:
    just = MIN_REPEATED_TOKENS // 4
    assert to_read_first(group(just, 0, 5)) == [prompt_of(just)]
    assert to_read_first(group(just, 0, 4)) == []
    assert to_read_first(group(just - 1, 0, 5)) == []
    assert to_read_first(group(1000, 0, 1)) == []


def test_scores_of_responses_longer_than_half_the_prompt_go_at_once() -> None:
    assert to_read_first(group(512, 256)) == [prompt_of(512)]
    assert to_read_first([*group(512, 256, 7), (prompt_of(512), (5,) * 257)]) == []


def test_a_prompt_that_fills_a_prefill_goes_with_its_group() -> None:
    assert to_read_first(group(MAX_PROMPT_TOKENS, 0)) == [prompt_of(MAX_PROMPT_TOKENS)]
    assert to_read_first(group(MAX_PROMPT_TOKENS + 1, 0)) == []


def test_every_group_of_a_call_is_judged_alone() -> None:
    mixed = [*group(300, 9, first=3), *group(20, 9, first=4), *group(300, 900, first=5)]
    assert to_read_first([*mixed, *group(200, 0, first=6)]) == [prompt_of(300), prompt_of(200, 6)]
    assert to_read_first([]) == []


@pytest.mark.parametrize("status", [200, 400])
def test_the_client_sends_the_prompt_alone_and_then_its_group(status: int) -> None:
    seen: list[dict] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(json.loads(await request.read()))
        # The group is refused, which ends the call; a prompt that is refused ends it before.
        return web.json_response([{}], status=status if len(seen) == 1 else 400)

    async def ask(url: str) -> None:
        async with SglangClient("rollout-0", url, KEYS, vocab_size=64) as client:
            sampling = Sampling(temperature=1.0, max_new_tokens=3)
            await client.generate([prompt_of(100)] * 8, sampling, [str(n) for n in range(8)])

    with pytest.raises(ServerError, match="status 400"):
        against(handle, ask)
    assert seen[0]["input_ids"] == [list(prompt_of(100))]
    assert seen[0]["sampling_params"]["max_new_tokens"] == 0
    assert [len(body["input_ids"]) for body in seen] == ([1, 8] if status == 200 else [1])
