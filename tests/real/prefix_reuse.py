"""How many tokens of a group's sequences a real server takes from its cache."""

from __future__ import annotations

from typing import Any

from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.requests import Sampling


async def cached_tokens(
    client: SglangClient, prompt: tuple[int, ...], responses: list[tuple[int, ...]]
) -> tuple[list[int], list[int]]:
    """As the server counts them, for the scores of a group and then for new tokens of another one.

    Returns:
        Of each sequence of both groups, in the order in which they were sent, the prompt alone first where it was sent.
    """
    seen: list[int] = []
    http: Any = client._http
    request_once = http.request_once

    async def spy(*arguments: Any, **options: Any) -> Any:
        answer = await request_once(*arguments, **options)
        seen.extend(item["meta_info"]["cached_tokens"] for item in answer)
        return answer

    await client.flush_cache()
    http.request_once = spy
    try:
        await client.score([(prompt, response) for response in responses])
        scores = seen.copy()
        seen.clear()
        other = (*reversed(prompt),)
        names = [f"cached-{number}" for number in range(len(responses))]
        sampling = Sampling(temperature=1.0, max_new_tokens=1)
        await client.generate([other] * len(responses), sampling, names)
        return scores, seen
    finally:
        http.request_once = request_once
