"""What requests to a server hold: how tokens are drawn, and what is to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Log-probs that come back are at `temperature`, before any truncation.

    Temperature 0 is greedy; its log-probs are at temperature 1. `stop_token_ids` end a response,
    and the one that did stays in it. The model's own end token always ends one.
    `with_kept_mass`: also ask which tokens top-p, top-k and min-p kept; needs a finite top_k.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    with_kept_mass: bool = False

    @property
    def is_plain(self) -> bool:
        """Every token is drawn with the model's own probability."""
        return (self.temperature, self.top_p, self.top_k, self.min_p) == (1.0, 1.0, -1, 0.0)

    def as_request(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "max_new_tokens": self.max_new_tokens,
            "stop_token_ids": list(self.stop_token_ids),
        }


def score_body(
    sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    rids: Sequence[str],
    topk: int,
    listed: Sequence[tuple[int, ...]] | None = None,
    *,
    compact: bool = True,
) -> dict[str, Any]:
    """The request that scores responses behind their prompts; its answer is read by `read_scores`.

    Args:
        compact: ask for the top-K in base64; a server that does not know it answers with nested lists.
    """
    body: dict[str, Any] = {
        "input_ids": [[*prompt, *response] for prompt, response in sequences],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [len(prompt) - 1 for prompt, _ in sequences],
        "top_logprobs_num": topk,
        "return_flat_raw_top_logprobs": compact and topk > 0,
        "return_flat_raw_top_logprobs_b64": compact and topk > 0,
        "rid": list(rids),
    }
    if listed is not None:
        body["token_ids_logprob"] = [list(ids) for ids in listed]
    return body
