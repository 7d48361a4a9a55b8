"""Strict reading of SGLang's `/generate` answers: a wrong field raises, nothing is guessed.

One item of an answer:

    {"output_ids": [..L..],
     "meta_info": {"id": rid, "prompt_tokens": P,
       "finish_reason": {"type": "stop" | "length" | "abort"},
       "weight_version": "3", "weight_versions": [{"version": "3", "start": 0, "end": L}],
       "output_token_logprobs": [[logprob, id, null], ..L..],
       "input_token_logprobs":  [[null, id, null], [logprob, id, null], ..]}}

Alignment of a score: a sequence of prompt P and response L tokens is sent with `logprob_start_len =
P - 1`, so exactly L + 1 rows come back. The first carries no log-prob and echoes the last prompt
token; row t + 1 echoes response token t. All echoes are compared, which makes a shift by one
impossible.

Top-K arrives as base64 of float32 and int32 (about 4 times faster than nested lists); nested lists
are accepted where a server does not know the flat form. Log-probs of generated tokens are at the
rollout temperature, those of scored tokens at temperature 1 (see `command.py`). Left out: text,
latencies, anything not named above.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from opd_megatron.errors import ContractError, ServerError

# log_softmax in float32 may end a hair above zero for a near-certain token.
_MAX_LOGPROB = 1e-6
# Sum of up to a whole vocabulary of float32 probabilities, each rounded.
_MAX_MASS = 1.0 + 1e-4


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated response: L tokens, their log-probs at the rollout temperature, its makers."""

    rid: str
    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float32]  # [L]
    finish_reason: str
    version_first: int
    version_last: int


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """Log-probs at temperature 1 of L given tokens, and the K likeliest at each position."""

    logprobs: NDArray[np.float32]  # [L]
    weight_version: int | None  # None for an empty response, which no server saw
    topk_ids: NDArray[np.int32] | None = None  # [L, K], likeliest first
    topk_logprobs: NDArray[np.float32] | None = None  # [L, K]


def broken(field: str, seen: object, rule: str) -> NoReturn:
    """Raise the ContractError of one field."""
    shown = repr(seen)
    raise ContractError(f"{field}={shown[:200]}{'...' if len(shown) > 200 else ''}: {rule}")


def error_message(body: Any) -> str | None:
    """The message of an error body in any of SGLang's four shapes, or None when it is none of them.

    `{"error": {"message": m}}`, `{"error": m}`, `{"object": "error", "message": m}`,
    `{"success": false, "message": m}`.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error["message"]
    if isinstance(error, str):
        return error
    flagged = body.get("object") == "error" or body.get("success") is False
    if flagged and isinstance(body.get("message"), str):
        return body["message"]
    return None


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
) -> Generation:
    """Read one generated response, named `rid` by its caller and `sent_as` on the wire.

    Raises:
        ContractError: a field is missing, of the wrong type, out of range or disagrees with
        another. ServerError: the server aborted the request.
    """
    meta = item["meta_info"]
    _equal("meta_info.id", meta.get("id"), sent_as)
    _equal("meta_info.prompt_tokens", meta.get("prompt_tokens"), prompt_length)
    finish_reason = _finish_reason(meta)
    ids = item.get("output_ids")
    if not isinstance(ids, list) or not 1 <= len(ids) <= max_new_tokens:
        broken("output_ids", ids, f"must be a list of 1 to {max_new_tokens} ids")
    for token_id in ids:
        _token_id("output_ids", token_id, vocab_size)
    rows = _rows("meta_info.output_token_logprobs", meta.get("output_token_logprobs"), len(ids))
    logprobs = _logprobs("meta_info.output_token_logprobs", rows, ids)
    if finish_reason == "length" and len(ids) != max_new_tokens:
        broken("output_ids", ids, f"finish_reason is length, so there must be {max_new_tokens}")
    first, last = _version_span(meta.get("weight_versions"), len(ids))
    return Generation(rid, tuple(ids), logprobs, finish_reason, first, last)


def parse_score(
    item: dict[str, Any],
    *,
    sent_as: str,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    vocab_size: int,
    topk: int,
) -> ScoredResponse:
    """Read the scores of one response that was sent behind its prompt.

    Raises:
        ContractError: as above, or an echoed id differs from the id that was sent.
        ServerError: the server aborted the request.
    """
    meta = item["meta_info"]
    _equal("meta_info.id", meta.get("id"), sent_as)
    num_tokens = len(prompt_ids) + len(response_ids)
    _equal("meta_info.prompt_tokens", meta.get("prompt_tokens"), num_tokens)
    _finish_reason(meta)
    _equal("output_ids", item.get("output_ids"), [])
    field = "meta_info.input_token_logprobs"
    rows = _rows(field, meta.get("input_token_logprobs"), len(response_ids) + 1)
    if rows[0][0] is not None:
        broken(f"{field}[0]", rows[0], "must carry no log-prob: nothing precedes it")
    _equal(f"{field}[0] id", _echoed(rows[0][1], prompt_ids[-1], vocab_size), prompt_ids[-1])
    scored = [
        [row[0], _echoed(row[1], sent, vocab_size)]
        for row, sent in zip(rows[1:], response_ids, strict=True)
    ]
    logprobs = _logprobs(field, scored, response_ids)
    version = parse_version("meta_info.weight_version", meta.get("weight_version"))
    if topk == 0:
        return ScoredResponse(logprobs, version)
    topk_ids, topk_logprobs = _topk(meta, len(response_ids), topk, vocab_size)
    return ScoredResponse(logprobs, version, topk_ids, topk_logprobs)


def parse_version(field: str, value: Any) -> int:
    """A weight version label: the decimal text of an integer that the run gave to the server."""
    if not isinstance(value, str) or not value.isascii() or not value.isdigit():
        broken(field, value, "must be a decimal weight version")
    return int(value)


def _echoed(seen: Any, sent: int, vocab_size: int) -> Any:
    """The echoed id, with one known quirk undone.

    SGLang's logprob_result_processor echoes the last id of the vocabulary of an *input* as 0 (its guard
    against ids of image tokens is off by one); the log-prob itself is the right token's.
    """
    return sent if sent == vocab_size - 1 and seen == 0 and _is_int(seen) else seen


def _equal(field: str, seen: Any, wanted: Any) -> None:
    if type(seen) is not type(wanted) or seen != wanted:
        broken(field, seen, f"must be {wanted!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_id(field: str, value: Any, vocab_size: int) -> None:
    if not _is_int(value) or not 0 <= value < vocab_size:
        broken(field, value, f"must be a token id in [0, {vocab_size})")


def _finish_reason(meta: dict[str, Any]) -> str:
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict) or reason.get("type") not in ("stop", "length", "abort"):
        broken("meta_info.finish_reason", reason, "type must be stop, length or abort")
    if reason["type"] == "abort":
        raise ServerError(f"request {meta.get('id')} was aborted: {reason.get('message')}")
    return reason["type"]


def _rows(field: str, value: Any, expected: int) -> list[Sequence[Any]]:
    """Rows `[logprob, id, text]`, exactly `expected` of them."""
    if not isinstance(value, list) or len(value) != expected:
        broken(field, value, f"must be a list of {expected} rows")
    for position, row in enumerate(value):
        if not isinstance(row, list) or len(row) < 2:
            broken(f"{field}[{position}]", row, "must be [logprob, id, text]")
    return value


def _logprobs(field: str, rows: Sequence[Sequence[Any]], ids: Sequence[int]) -> NDArray[np.float32]:
    for position, (row, token_id) in enumerate(zip(rows, ids, strict=True)):
        value = row[0]
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            broken(f"{field}[{position}]", row, "log-prob must be a finite number")
        if value > _MAX_LOGPROB:
            broken(f"{field}[{position}]", row, "log-prob must not be positive")
        if not _is_int(row[1]) or row[1] != token_id:
            broken(f"{field}[{position}]", row, f"must be of token {token_id}")
    return np.asarray([row[0] for row in rows], dtype=np.float32)


def _version_span(spans: Any, length: int) -> tuple[int, int]:
    """First and last version of `length` tokens; the spans must tile them in order."""
    field = "meta_info.weight_versions"
    if not isinstance(spans, list) or not spans:
        broken(field, spans, "must be a non-empty list of spans")
    position = 0
    for span in spans:
        if not isinstance(span, dict) or not _is_int(span.get("end")):
            broken(field, span, "a span must have integers start and end")
        if not _is_int(span.get("start")) or span["start"] != position or span["end"] <= position:
            broken(field, spans, f"spans must tile {length} tokens without gap or overlap")
        position = span["end"]
    if position != length:
        broken(field, spans, f"spans must tile {length} tokens")
    versions = [parse_version(f"{field}.version", span.get("version")) for span in spans]
    return versions[0], versions[-1]


def _topk(
    meta: dict[str, Any], length: int, topk: int, vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    if "input_top_logprobs_val_flat_b64" in meta:
        ids, logprobs = _flat_topk(meta, length, topk)
    else:
        ids, logprobs = _nested_topk(meta, length, topk)
    field = "meta_info.input_top_logprobs"
    if ids.min() < 0 or ids.max() >= vocab_size:
        broken(f"{field} ids", [int(ids.min()), int(ids.max())], f"must be in [0, {vocab_size})")
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        broken(f"{field} ids", ids.tolist(), "must be unique in each row")
    if np.isnan(logprobs).any() or (logprobs > _MAX_LOGPROB).any():
        broken(field, float(np.max(logprobs)), "log-probs must be numbers and not positive")
    mass = float(np.exp(logprobs.astype(np.float64)).sum(axis=1).max())
    if mass > _MAX_MASS:
        broken(f"{field} mass", mass, "probabilities of a row must not sum to more than 1")
    return ids, logprobs


def _flat_topk(
    meta: dict[str, Any], length: int, topk: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    for name, wanted in (("shape", [length, topk]), ("null_prefix", 1)):
        key = f"input_top_logprobs_{name}"
        _equal(f"meta_info.{key}", meta.get(key), wanted)
    logprobs = _decode_flat(meta, "val", "float32", length * topk).reshape(length, topk)
    ids = _decode_flat(meta, "idx", "int32", length * topk).reshape(length, topk)
    return ids.astype(np.int32), logprobs.astype(np.float32)


def _decode_flat(meta: dict[str, Any], part: str, dtype: str, count: int) -> NDArray[Any]:
    key = f"input_top_logprobs_{part}_flat_b64"
    _equal(f"meta_info.{key}_dtype", meta.get(f"{key}_dtype"), dtype)
    text = meta.get(key)
    if not isinstance(text, str):
        broken(f"meta_info.{key}", text, "must be base64 text")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ContractError(f"meta_info.{key}: not base64: {error}") from error
    little_endian = np.dtype(dtype).newbyteorder("<")
    if len(raw) != count * little_endian.itemsize:
        broken(f"meta_info.{key}", len(raw), f"must hold {count} values of {dtype}")
    return np.frombuffer(raw, dtype=little_endian)


def _nested_topk(
    meta: dict[str, Any], length: int, topk: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    field = "meta_info.input_top_logprobs"
    rows = meta.get("input_top_logprobs")
    if not isinstance(rows, list) or len(rows) != length + 1 or rows[0] is not None:
        broken(field, rows, f"must be null and then {length} rows")
    ids = np.empty((length, topk), dtype=np.int32)
    logprobs = np.empty((length, topk), dtype=np.float32)
    for position, row in enumerate(rows[1:]):
        for rank, entry in enumerate(_rows(f"{field}[{position + 1}]", row, topk)):
            if not isinstance(entry[0], float | int) or not _is_int(entry[1]):
                broken(f"{field}[{position + 1}][{rank}]", entry, "must be [logprob, id, text]")
            logprobs[position, rank], ids[position, rank] = entry[0], entry[1]
    return ids, logprobs
