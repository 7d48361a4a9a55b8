"""Asyncio client of one SGLang server: what a run asks of it, and nothing else.

    generate             POST /generate                  a group of prompts in one call
    score                POST /generate, 0 new tokens    prefill only, once per sequence
    weights              what an update needs, in weight_admin.py; admin key
    weight_checksums     POST /weights_checker           admin key
    flush_cache, abort_all                               admin key
    wait_ready           GET /ready, then /model_info with the key

Every id is checked against the vocabulary before it is sent, because an id outside of it kills the
server's whole process tree. Answers are read by `contract.py`. Left out: text in or out (ids only),
streaming, and `/server_info`, whose answer holds both keys.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_megatron.errors import InvalidRequest, TimedOut
from opd_megatron.serving.answers import Unanswered
from opd_megatron.serving.contract import (
    Generation,
    ScoredResponse,
    read_generations,
    read_scores,
)
from opd_megatron.serving.fields import broken, parse_version
from opd_megatron.serving.keys import ServerKeys
from opd_megatron.serving.prefix import read_first, to_read_first
from opd_megatron.serving.requests import Sampling, score_body
from opd_megatron.serving.transport import HttpTransport
from opd_megatron.serving.weight_admin import STALE_LABEL, WeightAdmin

NO_VERSION = -1
_READY_POLL_S = 0.2
_READY_TIMEOUT_S = 30.0

WaitReport = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What a server says about the model it serves. `weight_version`: NO_VERSION in the middle of an update."""

    model_path: str
    weight_version: int


class SglangClient:
    """One server. Create and use it within one event loop; `close` it at the end.

    Args:
        name: what messages and rollouts call the server, e.g. "rollout-0".
        url: base URL.
        keys: the run's keys.
        vocab_size: ids must be below this.
        timeout_s: budget of one call, its tries and waits included.
        max_retries: further tries after a failed connection or 5xx.

    Attributes:
        weights: the routes of a weight update.
    """

    def __init__(
        self,
        name: str,
        url: str,
        keys: ServerKeys,
        *,
        vocab_size: int,
        timeout_s: float = 600.0,
        max_retries: int = 3,
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self._keys = keys
        self._http = HttpTransport(name, url, timeout_s=timeout_s, max_retries=max_retries)
        self.weights = WeightAdmin(self._http, keys.admin)

    @property
    def url(self) -> str:
        return self._http.url

    @property
    def told_to_wait(self) -> int:
        """How often the server answered 429 or 503."""
        return self._http.told_to_wait

    async def __aenter__(self) -> SglangClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    async def wait_ready(self, deadline_s: float, on_wait: WaitReport | None = None) -> ModelAnswer:
        """Wait until the server accepts requests and proves to be this run's.

        Args:
            deadline_s: give up after this many seconds.
            on_wait: called about once a second with the seconds waited and what was last seen.

        Raises:
            ServerError: not ready in time, or another process answers on the port.
        """
        start = reported = time.monotonic()
        seen = "nothing yet"
        while True:
            try:
                await self._http.request_once("GET", "/ready", timeout_s=_READY_TIMEOUT_S)
                return await self.model_info()
            except (Unanswered, TimedOut) as error:
                # A process that loads a large model may accept a connection and say nothing for a while.
                seen = str(error)
            now = time.monotonic()
            if now - start > deadline_s:
                raise self._http.error("/ready", f"not ready after {deadline_s:g} s: {seen}")
            if on_wait is not None and now - reported >= 1.0:
                reported = now
                on_wait(now - start, f"{self.name} to load its model ({seen})")
            await asyncio.sleep(_READY_POLL_S)

    async def model_info(self) -> ModelAnswer:
        """Ask, with the key, which weights are loaded."""
        answer = await self._call("GET", "/model_info", self._keys.api, None)
        if not isinstance(answer, dict) or not isinstance(answer.get("model_path"), str):
            raise self._http.error("/model_info", f"not an SGLang server: {str(answer)[:200]}")
        label = answer.get("weight_version")
        version = NO_VERSION if label == STALE_LABEL else parse_version("weight_version", label)
        return ModelAnswer(answer["model_path"], version)

    async def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        rids: Sequence[str],
        topk: int = 0,
    ) -> list[Generation]:
        """Generate one response per prompt, in one call; repeat a prompt to sample it repeatedly.

        Args:
            prompts: non-empty id sequences.
            rids: one name per response, unique among the requests in flight.
            topk: also return the ids of the K likeliest tokens of each position, at the temperature.

        Raises:
            ServerError, ContractError: nothing of the group is returned.
        """
        if not prompts:
            return []
        for prompt in prompts:
            self._check_ids("prompt", prompt)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        shared = to_read_first([(prompt, ()) for prompt in prompts])
        await read_first(self._http, self._keys.api, shared)

        async def attempt(number: int) -> list[Generation]:
            wire = _wire_ids(rids, number)
            body = {
                "input_ids": [list(prompt) for prompt in prompts],
                "sampling_params": sampling.as_request(),
                "return_logprob": True,
                "top_logprobs_num": topk,
                "return_flat_raw_output_top_logprobs": topk > 0,
                "return_flat_raw_top_logprobs_b64": topk > 0,
                "rid": wire,
            }
            if sampling.with_kept_mass:
                body["return_sampling_mask"] = True
            answer = await self._http.request_once(
                "POST", "/generate", key=self._keys.api, body=body, paced=True
            )
            return read_generations(
                answer,
                rids=rids,
                sent_as=wire,
                prompts=prompts,
                vocab_size=self.vocab_size,
                max_new_tokens=sampling.max_new_tokens,
                server=self.name,
                topk=topk,
                kept_at_most=sampling.top_k if sampling.with_kept_mass else None,
            )

        return await self._http.with_retries("/generate", attempt)

    async def score_listed(
        self,
        sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        listed: Sequence[tuple[int, ...]],
    ) -> list[ScoredResponse]:
        """Log-probs, at temperature 1, of listed tokens at every position of a response.

        Args:
            sequences: pairs (prompt ids, response ids), neither empty.
            listed: of each sequence, distinct ids, at least one.

        Raises:
            ServerError, ContractError: nothing of the batch is returned.
        """
        for (prompt, response), ids in zip(sequences, listed, strict=True):
            for what, sent in (("prompt", prompt), ("response", response), ("listed", ids)):
                self._check_ids(what, sent)
            if not response or not ids or len(set(ids)) != len(ids):
                raise InvalidRequest(
                    f"{self.name}: {len(response)} response tokens and {len(ids)} listed ones, "
                    f"{len(set(ids))} of them distinct; wanted: some of both, without repetition"
                )
        return await self._score(sequences, 0, listed) if sequences else []

    async def score(
        self,
        sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        topk: int = 0,
    ) -> list[ScoredResponse]:
        """Log-probs, at temperature 1, of responses given their prompts; one prefill per sequence.

        Args:
            sequences: pairs (prompt ids, response ids); the prompt is not empty. An empty response
                gives zero-length scores and is not sent.
            topk: also return the K likeliest tokens of each position; the vocabulary's size gives
                the whole distribution.

        Raises:
            ServerError, ContractError: nothing of the batch is returned.
        """
        if not 0 <= topk <= self.vocab_size:
            raise InvalidRequest(f"topk={topk}: must be between 0 and {self.vocab_size}")
        for prompt, response in sequences:
            self._check_ids("prompt", prompt)
            self._check_ids("response", response)
        sent = [position for position, (_, response) in enumerate(sequences) if response]
        scores = [_empty_score(topk)] * len(sequences)
        if sent:
            chosen = [sequences[position] for position in sent]
            await read_first(self._http, self._keys.api, to_read_first(chosen))
            for position, score in zip(sent, await self._score(chosen, topk), strict=True):
                scores[position] = score
        return scores

    async def weight_checksums(self) -> dict[str, str]:
        """Checksums of the server's own (fused) tensors, keyed `rank/name`.

        Equal weights give equal checksums on servers of the same layout, device and SGLang version.
        They cannot be computed from a published file on every device, so probes prove updates.
        """
        body = {"action": "checksum"}
        answer = await self._call("POST", "/weights_checker", self._keys.admin, body)
        ranks = answer.get("ranks") if isinstance(answer, dict) else None
        if not isinstance(ranks, list) or not all(
            isinstance(rank, dict) and isinstance(rank.get("checksums"), dict) for rank in ranks
        ):
            broken("ranks", answer, "must be a list of objects with checksums")
        return {
            f"{number}/{name}": checksum
            for number, rank in enumerate(ranks)
            for name, checksum in rank["checksums"].items()
        }

    async def flush_cache(self) -> None:
        """Drop cached prefixes; refused while requests run."""
        await self._call("POST", "/flush_cache", self._keys.admin, {})

    async def abort_all(self) -> None:
        """End every request in flight; their callers get a ServerError."""
        body = {"abort_all": True, "rid": ""}
        await self._call("POST", "/abort_request", self._keys.admin, body)

    async def _score(
        self,
        sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        topk: int,
        listed: Sequence[tuple[int, ...]] | None = None,
    ) -> list[ScoredResponse]:
        batch = uuid.uuid4().hex
        rids = [f"score-{batch}-{position}" for position in range(len(sequences))]

        async def attempt(number: int) -> list[ScoredResponse]:
            wire = _wire_ids(rids, number)
            body = score_body(sequences, wire, topk, listed)
            answer = await self._http.request_once(
                "POST", "/generate", key=self._keys.api, body=body, paced=True
            )
            return read_scores(
                answer,
                sent_as=wire,
                sequences=sequences,
                vocab_size=self.vocab_size,
                topk=topk,
                listed=listed,
                server=self.name,
            )

        return await self._http.with_retries("/generate", attempt)

    async def _call(self, method: str, route: str, key: str, body: Mapping[str, Any] | None) -> Any:
        return await self._http.with_retries(
            route, lambda _: self._http.request_once(method, route, key=key, body=body)
        )

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        if not ids and what == "prompt":
            raise InvalidRequest(f"{self.name}: an empty prompt cannot be sent")
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"{self.name}: {what} holds id {token_id}, outside the vocabulary "
                    f"[0, {self.vocab_size}); not sent, because it would kill the server"
                )


def _wire_ids(rids: Sequence[str], attempt: int) -> list[str]:
    """A lost first try may still run on the server, which refuses an id that is in use."""
    return [f"{rid}/{attempt}" for rid in rids]


def _empty_score(topk: int) -> ScoredResponse:
    none = np.zeros(0, dtype=np.float32)
    if topk == 0:
        return ScoredResponse(none, None)
    ids = np.zeros((0, topk), dtype=np.int32)
    return ScoredResponse(none, None, ids, np.zeros((0, topk), dtype=np.float32))
