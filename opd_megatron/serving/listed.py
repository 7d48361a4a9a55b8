"""Log-probs of listed tokens: one list of ids for all positions of a response, nested JSON, no compact form.

SGLang takes a flat list for a sequence (per-position lists are refused), so a caller that wants other ids at other
positions sends a response in pieces (`teacher/asking.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_megatron.serving.fields import broken, is_int, is_number, read_rows
from opd_megatron.serving.topk import MAX_LOGPROB, MIN_LOGPROB

_FIELD = "meta_info.input_token_ids_logprobs"
# Sum over listed tokens, each rounded.
_MAX_MASS = 1.0 + 1e-4


def parse_listed(meta: dict[str, Any], listed: Sequence[int], length: int) -> NDArray[np.float32]:
    """Read and check the log-probs of `listed` at L positions.

    Args:
        meta: `meta_info` of one answer.
        listed: distinct ids, in the order they were sent.

    Returns:
        [L, len(listed)].

    Raises:
        ContractError: rows or ids are not those that were asked for, a log-prob is not a finite one, or
            the mass of a row is above 1.
    """
    rows = meta.get("input_token_ids_logprobs")
    if not isinstance(rows, list) or len(rows) != length + 1 or rows[0] is not None:
        broken(_FIELD, rows, f"must be null and then {length} rows")
    logprobs = np.empty((length, len(listed)), dtype=np.float32)
    for position, row in enumerate(rows[1:]):
        field = f"{_FIELD}[{position}]"
        entries = read_rows(field, row, len(listed))
        for column, (entry, token_id) in enumerate(zip(entries, listed, strict=True)):
            if not is_number(entry[0]) or not MIN_LOGPROB <= entry[0] <= MAX_LOGPROB:
                broken(f"{field}[{column}]", entry, "must start with a log-prob")
            if not is_int(entry[1]) or entry[1] != token_id:
                broken(f"{field}[{column}]", entry, f"must be of token {token_id}")
            logprobs[position, column] = entry[0]
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    if (mass > _MAX_MASS).any():
        first = int(np.argmax(mass > _MAX_MASS))
        broken(
            f"{_FIELD}[{first}]", float(mass[first]), "probabilities must not sum to more than 1"
        )
    return logprobs
