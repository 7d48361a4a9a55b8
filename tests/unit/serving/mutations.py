"""Seeded mutations of recorded answers, and a second reading of the contract to judge what the first one did.

`mutate` damages a body as a broken server, proxy or disk might. `is_right` is the contract once more, written from
its rules in plain Python and without the code under test: slow, and only about yes or no.
"""

from __future__ import annotations

import base64
import itertools
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import orjson

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 64, 2**31, 2**40, 2**63, -(2**40), 0.0, -0.5, 0.5, 1e-7, -1e300, 1e300,
    "", "7", "-1", "8", "stale", "\u0663", "9" * 5000, [], [[]], {}, [None], [-1.0, 4, None], {"type": "stop"},
)  # fmt: skip


def _somewhere(
    body: Any, rng: random.Random, accept: Callable[[Any], bool] = lambda value: True
) -> tuple[Any, Any] | None:
    """Walk down at random to an accepted value: its container and key; None when twenty walks find none."""
    for _ in range(20):
        container = body
        while isinstance(container, dict | list) and container:
            keys = list(container) if isinstance(container, dict) else range(len(container))
            key = rng.choice(keys)
            value = container[key]
            is_leaf = not isinstance(value, dict | list) or not value
            if accept(value) and (is_leaf or rng.random() < 0.3):
                return container, key
            container = value
    return None


def _lists(body: Any, rng: random.Random, least: int) -> list[Any] | None:
    """A random list of the answer with at least so many entries."""
    if isinstance(body, list) and len(body) >= least and rng.random() < 0.1:
        return body
    place = _somewhere(body, rng, lambda value: isinstance(value, list) and len(value) >= least)
    return None if place is None else place[0][place[1]]


def _set_value(body: Any, rng: random.Random) -> None:
    place = _somewhere(body, rng)
    if place is not None:
        place[0][place[1]] = rng.choice(_VALUES)


def _drop(body: Any, rng: random.Random) -> None:
    place = _somewhere(body, rng)
    if place is not None:
        del place[0][place[1]]


def _exchange(body: Any, rng: random.Random) -> None:
    chosen = _lists(body, rng, 2)
    if chosen is not None:
        first, second = rng.sample(range(len(chosen)), 2)
        chosen[first], chosen[second] = chosen[second], chosen[first]


def _shift(body: Any, rng: random.Random) -> None:
    chosen = _lists(body, rng, 2)
    if chosen is not None:
        chosen.append(chosen.pop(0))


def _shift_in(body: Any, rng: random.Random) -> None:
    """The list keeps its length and loses its first entry, as when an offset is wrong by one."""
    chosen = _lists(body, rng, 2)
    if chosen is not None:
        chosen[:] = [*chosen[1:], chosen[-1]]


def _repeat(body: Any, rng: random.Random) -> None:
    chosen = _lists(body, rng, 1)
    if chosen is not None:
        chosen.insert(rng.randrange(len(chosen) + 1), rng.choice(chosen))


def _cut(body: Any, rng: random.Random) -> None:
    chosen = _lists(body, rng, 1)
    if chosen is not None:
        del chosen[rng.randrange(len(chosen)) :]


def _scale_number(body: Any, rng: random.Random) -> None:
    place = _somewhere(body, rng, lambda v: isinstance(v, int | float) and abs(v) < 1e15)
    if place is not None:
        value = place[0][place[1]]
        place[0][place[1]] = rng.choice((value + 1, value - 1, -value, value * 10))


def _damage_base64(body: Any, rng: random.Random) -> None:
    is_base64 = lambda value: isinstance(value, str) and len(value) > 20  # noqa: E731
    place = _somewhere(body, rng, is_base64)
    if place is None or not str(place[1]).endswith("flat_b64"):
        return _set_value(body, rng)
    container, key = place
    raw = bytearray(base64.b64decode(container[key]))
    how = rng.randrange(5)
    if how == 0:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif how == 1:
        raw[:] = raw[4:] + raw[:4]
    elif how == 2:
        del raw[-rng.randrange(1, 8) :]
    elif how == 3:
        at = 4 * rng.randrange(len(raw) // 4)
        special = rng.choice((math.nan, math.inf, -math.inf, 0.5, -3e38))
        raw[at : at + 4] = struct.pack("<f", special)
    else:
        raw[:] = raw[::-1]
    container[key] = base64.b64encode(raw).decode()


STRUCTURAL: tuple[Callable[[Any, random.Random], None], ...] = (
    _set_value, _drop, _exchange, _shift, _shift_in, _repeat, _cut, _scale_number, _damage_base64,
)  # fmt: skip


def _flip(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]


def _digit(raw: bytes, rng: random.Random) -> bytes:
    at = rng.choice([at for at, byte in enumerate(raw) if 48 <= byte <= 57] or [0])
    return raw[:at] + bytes([48 + rng.randrange(10)]) + raw[at + 1 :]


def _truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def _insert(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    words = (b"null", b"NaN", b"-", b",", b"[", b"}", b"\x00", b"\xff", b"1e999", b"[" * 2000)
    return raw[:at] + rng.choice(words) + raw[at:]


def _garbage(raw: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(40))


def _replace_number(raw: bytes, rng: random.Random) -> bytes:
    for word in (b"-1.", b"-2.", b"-3.", b"-5."):
        if word in raw:
            return raw.replace(word, rng.choice((b"NaN,-1.", b"1.", b"-0.", b"-1e9")), 1)
    return _flip(raw, rng)


TEXTUAL: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _digit, _truncate, _insert, _garbage, _replace_number,
)  # fmt: skip


def mutate(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One damaged body (now and then damaged twice) and what was done to it."""
    names: list[str] = []
    if rng.random() < 0.75:
        body = orjson.loads(raw)
        for _ in range(1 if rng.random() < 0.8 else 2):
            change = rng.choice(STRUCTURAL)
            names.append(change.__name__)
            change(body, rng)
        raw = orjson.dumps(body)
    if not names or rng.random() < 0.1:
        rewrite = rng.choice(TEXTUAL)
        names.append(rewrite.__name__)
        raw = rewrite(raw, rng)
    return "+".join(names), raw


# ------------------------------------------------------------ the second reading


def is_right(raw: bytes, request: dict[str, Any], vocab_size: int) -> bool:
    """Whether a body keeps every rule of the contract for this request."""
    try:
        body = orjson.loads(raw)
        items = body if isinstance(body, list) else []
        is_score = request["sampling_params"]["max_new_tokens"] == 0
        judge = _score_is_right if is_score else _generation_is_right
        return len(items) == len(request["input_ids"]) and all(
            judge(item, request, number, vocab_size) for number, item in enumerate(items)
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return False


def _same(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and value == wanted


def _is_logprob(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -3.4028234663852886e38 <= value <= 1e-6
    )


def _is_version(value: Any) -> bool:
    return (
        isinstance(value, str) and 1 <= len(value) <= 18 and all(c in "0123456789" for c in value)
    )


def _generation_is_right(item: Any, request: dict[str, Any], number: int, vocab: int) -> bool:
    meta, ids = item["meta_info"], item["output_ids"]
    limit = request["sampling_params"]["max_new_tokens"]
    reason, end, newest = meta["finish_reason"], 0, -1
    for span in meta["weight_versions"]:
        if not _same(span["start"], end) or type(span["end"]) is not int or span["end"] <= end:
            return False
        if not _is_version(span["version"]) or int(span["version"]) <= newest:
            return False
        end, newest = span["end"], int(span["version"])
    if reason["type"] == "length":
        ended = _same(reason["length"], limit) and len(ids) == limit
    else:
        ended = reason["type"] == "stop" and _same(reason["matched"], ids[-1])
    right = (
        isinstance(ids, list)
        and 1 <= len(ids) <= limit
        and all(type(i) is int and 0 <= i < vocab for i in ids)
        and _same(meta["id"], request["rid"][number])
        and _same(meta["prompt_tokens"], len(request["input_ids"][number]))
        and _same(meta["completion_tokens"], len(ids))
        and ended
        and end == len(ids)
        and isinstance(meta["weight_versions"], list)
        and isinstance(meta["output_token_logprobs"], list)
        and len(meta["output_token_logprobs"]) == len(ids)
        and all(
            isinstance(row, list) and _is_logprob(row[0]) and _same(row[1], i)
            for row, i in zip(meta["output_token_logprobs"], ids, strict=True)
        )
    )
    topk = request.get("top_logprobs_num", 0)
    if not right or topk == 0:
        return right
    sampled = [(i, row[0]) for i, row in zip(ids, meta["output_token_logprobs"], strict=True)]
    return _lists_are_right(_topk_rows(meta, "output", len(ids), topk), sampled, vocab)


def _score_is_right(item: Any, request: dict[str, Any], number: int, vocab: int) -> bool:
    meta, sent = item["meta_info"], request["input_ids"][number]
    start, topk = request["logprob_start_len"][number], request["top_logprobs_num"]
    rows, wanted = meta["input_token_logprobs"], sent[start:]
    reason = meta["finish_reason"]
    echoes = (
        _same(row[1], i) or (i == vocab - 1 and _same(row[1], 0))
        for row, i in zip(rows, wanted, strict=True)
    )
    right = (
        item["output_ids"] == []
        and _same(meta["id"], request["rid"][number])
        and _same(meta["prompt_tokens"], len(sent))
        and _same(meta["completion_tokens"], 0)
        and reason["type"] in ("stop", "length")
        and _same(reason["length"], 0)
        and _is_version(meta["weight_version"])
        and isinstance(rows, list)
        and all(isinstance(row, list) for row in rows)
        and all(echoes)
        and rows[0][0] is None
        and all(_is_logprob(row[0]) for row in rows[1:])
    )
    if right and "token_ids_logprob" in request:
        asked = request["token_ids_logprob"][number]
        return _asked_is_right(meta["input_token_ids_logprobs"], asked, len(wanted) - 1)
    if not right or topk == 0:
        return right
    sampled = [(i, row[0]) for i, row in zip(wanted[1:], rows[1:], strict=True)]
    return _lists_are_right(_topk_rows(meta, "input", len(sampled), topk), sampled, vocab)


def _asked_is_right(rows: Any, asked: list[int], length: int) -> bool:
    return (
        isinstance(rows, list)
        and len(rows) == length + 1
        and rows[0] is None
        and all(
            isinstance(row, list)
            and [entry[1] for entry in row] == asked
            and all(type(entry[1]) is int and _is_logprob(entry[0]) for entry in row)
            and all(isinstance(entry, list) for entry in row)
            and sum(math.exp(entry[0]) for entry in row) <= 1.0 + 1e-4
            for row in rows[1:]
        )
    )


def _lists_are_right(
    listed: list[list[tuple[float, int]]], sampled: list[tuple[int, float]], vocab: int
) -> bool:
    return all(
        _row_is_right(row, own, value, vocab)
        for row, (own, value) in zip(listed, sampled, strict=True)
    )


def _topk_rows(
    meta: dict[str, Any], side: str, length: int, topk: int
) -> list[list[tuple[float, int]]]:
    name, nulls = f"{side}_top_logprobs", 1 if side == "input" else 0
    if f"{name}_val_flat_b64" not in meta:
        rows = meta[name]
        if not isinstance(rows, list) or len(rows) != length + nulls:
            raise ValueError
        if rows[:nulls] != [None] * nulls:
            raise ValueError
        if any(
            not isinstance(row, list)
            or len(row) != topk
            or not all(isinstance(e, list) for e in row)
            for row in rows[nulls:]
        ):
            raise ValueError
        return [[(entry[0], entry[1]) for entry in row] for row in rows[nulls:]]
    if meta[f"{name}_shape"] != [length, topk] or not _same(meta[f"{name}_null_prefix"], nulls):
        raise ValueError
    read: dict[str, tuple[Any, ...]] = {}
    for part, dtype, code in (("val", "float32", "f"), ("idx", "int32", "i")):
        if meta[f"{name}_{part}_flat_b64_dtype"] != dtype:
            raise ValueError
        raw = base64.b64decode(meta[f"{name}_{part}_flat_b64"].encode("ascii"), validate=True)
        if len(raw) != 4 * length * topk:
            raise ValueError
        read[part] = struct.unpack(f"<{length * topk}{code}", raw)
    pairs = list(zip(read["val"], read["idx"], strict=True))
    return [pairs[i * topk : (i + 1) * topk] for i in range(length)]


def _row_is_right(row: list[tuple[float, int]], own: int, value: float, vocab: int) -> bool:
    values, ids = [v for v, _ in row], [i for _, i in row]
    if not all(_is_logprob(v) and math.isfinite(v) for v in values):
        return False
    if not all(type(i) is int and 0 <= i < vocab for i in ids) or len(set(ids)) != len(ids):
        return False
    if any(later > earlier for earlier, later in itertools.pairwise(values)):
        return False
    mass = sum(math.exp(v) for v in values) + (0.0 if own in ids else math.exp(value))
    last = values[ids.index(own)] if own in ids else values[-1]
    delta = abs(value - last) if own in ids else value - last
    return mass <= 1.0 + 1e-4 and delta <= 1e-3
