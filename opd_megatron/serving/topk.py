"""The top-K part of an answer: K ids and log-probs for each of L positions, likeliest first.

Of a prompt that is scored (side "input", whose first row is null) or of a response that is generated ("output").

Base64 of little-endian float32 and int32 (about 4 times faster than nested lists), or nested lists
where a server does not know the flat form: the keys of the answer decide. Either way the same
rules hold: ids in the vocabulary and unique in their row, log-probs finite, not positive and
sorted, mass at most 1, and what it says of the sampled token is what the sampled token's own
log-prob says.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_megatron.errors import ContractError
from opd_megatron.serving.fields import broken, check_equal, is_int, is_number, read_rows

# log_softmax in float32 may end a hair above zero for a near-certain token.
MAX_LOGPROB = 1e-6
MIN_LOGPROB = float(np.finfo(np.float32).min)
# Sum of up to a whole vocabulary of float32 probabilities, each rounded.
_MAX_MASS = 1.0 + 1e-4
# Between two readings of one token's log-prob in one answer.
_SAME_LOGPROB = 1e-3
_MAX_ID = 1 << 31  # of an int32


def parse_topk(
    meta: dict[str, Any],
    topk: int,
    vocab_size: int,
    sampled_ids: NDArray[np.int64],
    sampled_logprobs: NDArray[np.float32],
    side: str = "input",
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Read and check the top-K of L positions.

    Args:
        meta: `meta_info` of one answer.
        sampled_ids: [L] the tokens that were scored.
        sampled_logprobs: [L] their log-probs, as the same answer states them.
        side: "input" or "output".

    Returns:
        [L, K] ids and [L, K] log-probs.

    Raises:
        ContractError: a rule of the module docstring is broken.
    """
    length = len(sampled_ids)
    prefix = f"{side}_top_logprobs"
    field = f"meta_info.{prefix}"
    is_flat = f"{prefix}_val_flat_b64" in meta
    ids, logprobs = (_flat if is_flat else _nested)(meta, prefix, length, topk)
    if ids.min() < 0 or ids.max() >= vocab_size:
        broken(f"{field} ids", [int(ids.min()), int(ids.max())], f"must be in [0, {vocab_size})")
    ordered = np.sort(ids, axis=1)
    _refuse(
        field, (ordered[:, 1:] == ordered[:, :-1]).any(axis=1), ids, "ids must be unique in a row"
    )
    wrong = ~np.isfinite(logprobs) | (logprobs > MAX_LOGPROB)
    _refuse(field, wrong.any(axis=1), logprobs, "log-probs must be finite and not positive")
    rising = logprobs[:, 1:] > logprobs[:, :-1]
    _refuse(field, rising.any(axis=1), logprobs, "must be sorted, likeliest first")
    # The sampled token's own mass counts where it is not one of the K.
    is_sampled = ids == sampled_ids[:, None]
    outside = ~is_sampled.any(axis=1)
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    mass += outside * np.exp(sampled_logprobs.astype(np.float64))
    _refuse(field, mass > _MAX_MASS, logprobs, "probabilities must not sum to more than 1")
    delta = np.where(is_sampled, np.abs(logprobs - sampled_logprobs[:, None]), 0.0).max(axis=1)
    _refuse(
        field, delta > _SAME_LOGPROB, logprobs, "differs from the log-prob of the sampled token"
    )
    excess = outside * (sampled_logprobs - logprobs[:, -1])
    _refuse(
        field, excess > _SAME_LOGPROB, logprobs, "leaves out a sampled token likelier than its last"
    )
    return ids, logprobs


def _refuse(field: str, is_wrong: Any, rows_LK: NDArray[Any], rule: str) -> None:
    """Raise about the first row that is wrong; `is_wrong` [L] bool."""
    if is_wrong.any():
        first = int(np.argmax(is_wrong))
        broken(f"{field}[{first}]", rows_LK[first, :8].tolist(), rule)


def _flat(
    meta: dict[str, Any], prefix: str, length: int, topk: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    for name, wanted in (("shape", [length, topk]), ("null_prefix", _null_rows(prefix))):
        key = f"{prefix}_{name}"
        check_equal(f"meta_info.{key}", meta.get(key), wanted)
    logprobs = _decode_flat(meta, f"{prefix}_val", "float32", length * topk).reshape(length, topk)
    ids = _decode_flat(meta, f"{prefix}_idx", "int32", length * topk).reshape(length, topk)
    return ids.astype(np.int32), logprobs.astype(np.float32)


def _decode_flat(meta: dict[str, Any], part: str, dtype: str, count: int) -> NDArray[Any]:
    key = f"{part}_flat_b64"
    check_equal(f"meta_info.{key}_dtype", meta.get(f"{key}_dtype"), dtype)
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


def _null_rows(prefix: str) -> int:
    """Nothing precedes the first scored token of a prompt."""
    return 1 if prefix.startswith("input") else 0


def _nested(
    meta: dict[str, Any], prefix: str, length: int, topk: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    field, nulls = f"meta_info.{prefix}", _null_rows(prefix)
    listed = meta.get(prefix)
    if (
        not isinstance(listed, list)
        or len(listed) != length + nulls
        or listed[:nulls] != [None] * nulls
    ):
        broken(field, listed, f"must be {'null and then ' * nulls}{length} rows")
    ids = np.empty((length, topk), dtype=np.int32)
    logprobs = np.empty((length, topk), dtype=np.float32)
    for position, row in enumerate(listed[nulls:]):
        where = f"{field}[{position}]"
        for rank, entry in enumerate(read_rows(where, row, topk)):
            if not is_number(entry[0]) or not MIN_LOGPROB <= entry[0] <= MAX_LOGPROB:
                broken(f"{where}[{rank}]", entry, "must start with a log-prob")
            if not is_int(entry[1]) or not 0 <= entry[1] < _MAX_ID:
                broken(f"{where}[{rank}]", entry, "must be [logprob, id, text]")
            logprobs[position, rank], ids[position, rank] = entry[0], entry[1]
    return ids, logprobs
