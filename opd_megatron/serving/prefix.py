"""Which prompts a server should read before the sequences that begin with them.

SGLang looks a sequence up in its prefix cache when it joins a prefill, and writes to the cache when the prefill is
done. So sequences of one prompt that are read in one prefill (up to `--chunked-prefill-size` tokens) compute the
prompt once each, whatever the schedule policy; those of later prefills find it. Sending the prompt alone first, one
round trip, makes it once for all.

When that is worth its round trip is measured (docs/transport.md#a-prompt-that-a-group-shares): for new tokens, and for
scores of responses at most half as long as their prompt; not for prompts so long that few of them share a prefill.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from opd_megatron.serving.transport import HttpTransport

# Tokens that would be computed again; fewer cost less than a round trip.
MIN_REPEATED_TOKENS = 512
MAX_PROMPT_TOKENS = 2048


def to_read_first(
    sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
) -> list[tuple[int, ...]]:
    """Distinct prompts, in the order in which they appear.

    Args:
        sequences: pairs (prompt ids, ids that are read behind it) of one request.

    Returns:
        The prompts that several sequences share, where reading them first is worth a round trip; often none.
    """
    behind: dict[tuple[int, ...], list[int]] = {}
    for prompt, rest in sequences:
        behind.setdefault(prompt, []).append(len(rest))
    return [
        prompt
        for prompt, lengths in behind.items()
        if len(prompt) <= MAX_PROMPT_TOKENS
        and (len(lengths) - 1) * len(prompt) >= MIN_REPEATED_TOKENS
        and len(lengths) * len(prompt) >= 2 * sum(lengths)
    ]


async def read_first(http: HttpTransport, key: str, prompts: Sequence[tuple[int, ...]]) -> None:
    """Have a server compute prompts and keep them in its prefix cache; nothing is taken from its answer.

    Raises:
        ServerError, ContractError: as any request.
    """
    if not prompts:
        return
    name = uuid.uuid4().hex

    async def attempt(number: int) -> None:
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
            # A lost first try may still run on the server, which refuses an id that is in use.
            "rid": [f"prompt-{name}-{position}/{number}" for position in range(len(prompts))],
        }
        await http.request_once("POST", "/generate", key=key, body=body, paced=True)

    await http.with_retries("/generate", attempt)
