"""Strict reading of SGLang's `/generate` answers: a wrong field raises, nothing is guessed.

One item of an answer:

    {"output_ids": [..L..],
     "meta_info": {"id": rid, "prompt_tokens": P,
       "completion_tokens": L,
       "finish_reason": {"type": "stop", "matched": id} | {"type": "length", "length": L} | {"type": "abort"},
       "weight_version": "3", "weight_versions": [{"version": "3", "start": 0, "end": L}],
       "output_token_logprobs": [[logprob, id, null], ..L..],
       "input_token_logprobs":  [[null, id, null], [logprob, id, null], ..]}}

Alignment of a score: a sequence of prompt P and response L tokens is sent with `logprob_start_len =
P - 1`, so exactly L + 1 rows come back. The first carries no log-prob and echoes the last prompt
token; row t + 1 echoes response token t. All echoes are compared, which makes a shift by one
impossible.

The top-K of a score is read in `topk.py`. Log-probs of generated tokens are at the
rollout temperature, those of scored tokens at temperature 1 (see `command.py`). Left out: text,
latencies, anything not named above.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_megatron.errors import ServerError
from opd_megatron.serving.answers import error_message
from opd_megatron.serving.fields import (
    broken,
    check_equal,
    check_token_id,
    is_int,
    is_number,
    parse_version,
    read_rows,
)
from opd_megatron.serving.kept_mass import parse_kept
from opd_megatron.serving.listed import parse_listed
from opd_megatron.serving.topk import MAX_LOGPROB, MIN_LOGPROB, parse_topk
from opd_megatron.types import spread_versions


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated response: L tokens, their log-probs at the rollout temperature, its makers.

    topk_ids: the K likeliest tokens of each position, if they were asked for.
    """

    rid: str
    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float32]  # [L]
    finish_reason: str
    version_first: int
    version_last: int
    server: str
    topk_ids: NDArray[np.int32] | None = None  # [L, K], likeliest first
    kept_logmass: NDArray[np.float32] | None = (
        None  # [L], see kept_mass.py; None when not asked for
    )
    # Where more than one version wrote it: (version, end) of each stretch of tokens.
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def token_versions(self) -> NDArray[np.int32]:
        """[L] weight version that wrote each token."""
        return spread_versions(self.spans or ((self.version_first, len(self.token_ids)),))


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """Log-probs at temperature 1 of L given tokens, and the K likeliest at each position."""

    logprobs: NDArray[np.float32]  # [L]
    weight_version: int | None  # None for an empty response, which no server saw
    topk_ids: NDArray[np.int32] | None = None  # [L, K], likeliest first
    topk_logprobs: NDArray[np.float32] | None = None  # [L, K]
    listed_logprobs: NDArray[np.float32] | None = None  # [L, tokens that were listed]
    server: str = ""  # who scored it, and has it in its cache


def read_generations(
    answer: Any,
    *,
    rids: Sequence[str],
    sent_as: Sequence[str],
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    max_new_tokens: int,
    server: str,
    topk: int = 0,
    kept_at_most: int | None = None,
) -> list[Generation]:
    """The whole answer to a call of `generate`: all of it is right, or nothing is returned.

    Args:
        kept_at_most: top-k of a request that asked which tokens truncation kept; None: it did not ask.

    Raises:
        ContractError, ServerError: as `parse_items` and `parse_generation`.
    """
    return [
        parse_generation(
            item,
            rid=rid,
            sent_as=wire_id,
            prompt_length=len(prompt),
            vocab_size=vocab_size,
            max_new_tokens=max_new_tokens,
            server=server,
            topk=topk,
            kept_at_most=kept_at_most,
        )
        for item, rid, wire_id, prompt in zip(
            parse_items(answer, len(prompts)), rids, sent_as, prompts, strict=True
        )
    ]


def read_scores(
    answer: Any,
    *,
    sent_as: Sequence[str],
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    vocab_size: int,
    topk: int,
    listed: Sequence[Sequence[int]] | None = None,
    server: str = "",
) -> list[ScoredResponse]:
    """The whole answer to a call of `score` or `score_listed`, in the same way."""
    scores = [
        parse_score(
            item,
            sent_as=wire_id,
            prompt_ids=prompt,
            response_ids=response,
            vocab_size=vocab_size,
            topk=topk,
            listed=ids,
        )
        for item, wire_id, (prompt, response), ids in zip(
            parse_items(answer, len(sequences)),
            sent_as,
            sequences,
            listed or [()] * len(sequences),
            strict=True,
        )
    ]
    return [replace(score, server=server) for score in scores]


def parse_items(body: Any, expected: int) -> list[dict[str, Any]]:
    """The items of a batched answer.

    Raises:
        ServerError: the body is an error message.
        ContractError: not a list of `expected` objects.
    """
    message = error_message(body)
    if message is not None:
        raise ServerError(message)
    if not isinstance(body, list) or len(body) != expected:
        broken("body", body, f"must be a list of {expected} items")
    for position, item in enumerate(body):
        if not isinstance(item, dict) or not isinstance(item.get("meta_info"), dict):
            broken(f"body[{position}]", item, "must be an object with meta_info")
    return body


def parse_generation(
    item: dict[str, Any],
    *,
    rid: str,
    sent_as: str,
    prompt_length: int,
    vocab_size: int,
    max_new_tokens: int,
    server: str,
    topk: int = 0,
    kept_at_most: int | None = None,
) -> Generation:
    """Read one generated response, named `rid` by its caller and `sent_as` on the wire.

    Raises:
        ContractError: a field is missing, of the wrong type, out of range or disagrees with
        another. ServerError: the server aborted the request.
    """
    meta = item["meta_info"]
    check_equal("meta_info.id", meta.get("id"), sent_as)
    check_equal("meta_info.prompt_tokens", meta.get("prompt_tokens"), prompt_length)
    reason = _finish_reason(meta)
    ids = item.get("output_ids")
    if not isinstance(ids, list) or not 1 <= len(ids) <= max_new_tokens:
        broken("output_ids", ids, f"must be a list of 1 to {max_new_tokens} ids")
    for token_id in ids:
        check_token_id("output_ids", token_id, vocab_size)
    rows = read_rows("meta_info.output_token_logprobs", meta.get("output_token_logprobs"), len(ids))
    logprobs = _logprobs("meta_info.output_token_logprobs", rows, ids)
    check_equal("meta_info.completion_tokens", meta.get("completion_tokens"), len(ids))
    if reason["type"] == "length":
        check_equal("meta_info.finish_reason.length", reason.get("length"), len(ids))
        if len(ids) != max_new_tokens:
            broken("output_ids", ids, f"finish_reason is length, so there must be {max_new_tokens}")
    else:
        check_equal("meta_info.finish_reason.matched", reason.get("matched"), ids[-1])
    spans = _version_spans(meta.get("weight_versions"), len(ids))
    made_by = (reason["type"], spans[0][0], spans[-1][0], server)
    several = spans if len(spans) > 1 else ()
    topk_ids = kept = None
    if topk:
        topk_ids, _ = parse_topk(meta, topk, vocab_size, np.asarray(ids), logprobs, "output")
    if kept_at_most is not None:
        kept = parse_kept(meta, ids, logprobs, vocab_size, kept_at_most)
    return Generation(rid, tuple(ids), logprobs, *made_by, topk_ids, kept, several)


def parse_score(
    item: dict[str, Any],
    *,
    sent_as: str,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    vocab_size: int,
    topk: int,
    listed: Sequence[int] = (),
) -> ScoredResponse:
    """Read the scores of one response that was sent behind its prompt.

    Raises:
        ContractError: as above, or an echoed id differs from the id that was sent.
        ServerError: the server aborted the request.
    """
    meta = item["meta_info"]
    check_equal("meta_info.id", meta.get("id"), sent_as)
    num_tokens = len(prompt_ids) + len(response_ids)
    check_equal("meta_info.prompt_tokens", meta.get("prompt_tokens"), num_tokens)
    check_equal("meta_info.finish_reason.length", _finish_reason(meta).get("length"), 0)
    check_equal("output_ids", item.get("output_ids"), [])
    check_equal("meta_info.completion_tokens", meta.get("completion_tokens"), 0)
    field = "meta_info.input_token_logprobs"
    rows = read_rows(field, meta.get("input_token_logprobs"), len(response_ids) + 1)
    if rows[0][0] is not None:
        broken(f"{field}[0]", rows[0], "must carry no log-prob: nothing precedes it")
    check_equal(f"{field}[0] id", _echoed(rows[0][1], prompt_ids[-1], vocab_size), prompt_ids[-1])
    scored = [
        [row[0], _echoed(row[1], sent, vocab_size)]
        for row, sent in zip(rows[1:], response_ids, strict=True)
    ]
    logprobs = _logprobs(field, scored, response_ids)
    version = parse_version("meta_info.weight_version", meta.get("weight_version"))
    if listed:
        listed_logprobs = parse_listed(meta, listed, len(response_ids))
        return ScoredResponse(logprobs, version, listed_logprobs=listed_logprobs)
    if topk == 0:
        return ScoredResponse(logprobs, version)
    sent_ids = np.asarray(response_ids)
    topk_ids, topk_logprobs = parse_topk(meta, topk, vocab_size, sent_ids, logprobs)
    return ScoredResponse(logprobs, version, topk_ids, topk_logprobs)


def _echoed(seen: Any, sent: int, vocab_size: int) -> Any:
    """The echoed id, with one known quirk undone.

    SGLang's logprob_result_processor echoes the last id of the vocabulary of an *input* as 0 (its guard
    against ids of image tokens is off by one); the log-prob itself is the right token's.
    """
    return sent if sent == vocab_size - 1 and seen == 0 and is_int(seen) else seen


def _finish_reason(meta: dict[str, Any]) -> dict[str, Any]:
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict) or reason.get("type") not in ("stop", "length", "abort"):
        broken("meta_info.finish_reason", reason, "type must be stop, length or abort")
    if reason["type"] == "abort":
        raise ServerError(f"request {meta.get('id')} was aborted: {reason.get('message')}")
    return reason


def _logprobs(field: str, rows: Sequence[Sequence[Any]], ids: Sequence[int]) -> NDArray[np.float32]:
    for position, (row, token_id) in enumerate(zip(rows, ids, strict=True)):
        value = row[0]
        if not is_number(value) or not MIN_LOGPROB <= value <= MAX_LOGPROB:
            broken(f"{field}[{position}]", row, "must hold a finite log-prob that is not positive")
        if not is_int(row[1]) or row[1] != token_id:
            broken(f"{field}[{position}]", row, f"must be of token {token_id}")
    return np.asarray([row[0] for row in rows], dtype=np.float32)


def _version_spans(spans: Any, length: int) -> tuple[tuple[int, int], ...]:
    """(version, end) of each stretch of `length` tokens; they must tile them in order, by ever newer versions."""
    field = "meta_info.weight_versions"
    if not isinstance(spans, list) or not spans:
        broken(field, spans, "must be a non-empty list of spans")
    position = 0
    for span in spans:
        if not isinstance(span, dict) or not is_int(span.get("end")):
            broken(field, span, "a span must have integers start and end")
        if not is_int(span.get("start")) or span["start"] != position or span["end"] <= position:
            broken(field, spans, f"spans must tile {length} tokens without gap or overlap")
        position = span["end"]
    if position != length:
        broken(field, spans, f"spans must tile {length} tokens")
    versions = [parse_version(f"{field}.version", span.get("version")) for span in spans]
    if any(newer <= older for older, newer in itertools.pairwise(versions)):
        broken(field, spans, "every span must be of a newer version than the one before")
    return tuple((version, span["end"]) for version, span in zip(versions, spans, strict=True))
