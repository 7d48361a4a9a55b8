"""How much probability top-p, top-k and min-p left at every position of a generation.

The server states two log-probs of a sampled token: of the whole distribution at the rollout temperature (`log pi`), and
of the one it drew from (`log mu`), which is `pi` renormalised to the tokens that truncation kept:

    mu(y) = pi(y) / Z,   Z = sum of pi over the kept tokens,   log Z = log pi(y) - log mu(y)

so Z is exact from one token. In `meta_info` of a request with `return_sampling_mask`:

    "output_token_sampling_mask":     [[id, ..], ..L..]   the kept tokens
    "output_token_sampling_logprobs": [log mu, ..L..]
    "output_token_sampling_mask_length": L

The ids are checked and not kept: no loss here needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_megatron.serving.fields import broken, check_equal, check_token_id, is_number
from opd_megatron.serving.topk import MAX_LOGPROB, MIN_LOGPROB

# Between two float32 readings of one probability, one of them divided by a sum of others.
_SAME_LOGPROB = 1e-3
_MASK = "meta_info.output_token_sampling_mask"
_LOGPROBS = "meta_info.output_token_sampling_logprobs"


def parse_kept(
    meta: dict[str, Any],
    ids: Sequence[int],
    logprobs: NDArray[np.float32],
    vocab_size: int,
    top_k: int,
) -> NDArray[np.float32]:
    """Read and check what truncation kept.

    Args:
        meta: `meta_info` of one answer.
        ids: the L sampled tokens.
        logprobs: [L] their log-probs before truncation, from the same answer.
        top_k: of the request: at most as many tokens are kept.

    Returns:
        [L] float32 log Z, never positive.

    Raises:
        ContractError: a list has another length, a kept set is empty, larger than top_k, repeats an id or lacks the
            sampled one, or `log mu` is no log-prob, below `log pi`, or not 0 for a set of one.
    """
    check_equal(f"{_MASK}_length", meta.get("output_token_sampling_mask_length"), len(ids))
    kept, stated = (
        meta.get("output_token_sampling_mask"),
        meta.get("output_token_sampling_logprobs"),
    )
    for field, value in ((_MASK, kept), (_LOGPROBS, stated)):
        if not isinstance(value, list) or len(value) != len(ids):
            broken(field, value, f"must be a list of {len(ids)} entries")
    assert isinstance(kept, list) and isinstance(stated, list)
    for position, (support, value, token) in enumerate(zip(kept, stated, ids, strict=True)):
        _check_support(f"{_MASK}[{position}]", support, token, vocab_size, top_k)
        field = f"{_LOGPROBS}[{position}]"
        if not is_number(value) or not MIN_LOGPROB <= value <= MAX_LOGPROB:
            broken(field, value, "must be a finite log-prob that is not positive")
        if value < logprobs[position] - _SAME_LOGPROB:
            broken(field, value, f"truncation can only raise the log-prob {logprobs[position]:.6g}")
        if len(support) == 1 and value < -_SAME_LOGPROB:
            broken(field, value, "the only kept token is certain")
    behavior = np.asarray(stated, dtype=np.float32)
    return np.minimum(logprobs - behavior, 0.0).astype(np.float32)


def _check_support(field: str, support: Any, token: int, vocab_size: int, top_k: int) -> None:
    if not isinstance(support, list) or not 1 <= len(support) <= top_k:
        broken(field, support, f"must be a list of 1 to {top_k} ids (rollout.top_k)")
    for token_id in support:
        check_token_id(field, token_id, vocab_size)
    if len(set(support)) != len(support):
        broken(field, support, "ids must be unique")
    if token not in support:
        broken(field, support, f"must hold the sampled token {token}")
