"""Which sequences are scored in one request: neighbours, so many that an answer stays small.

A request is answered when all of its sequences are done, as one JSON document that server and client hold whole. Its
size goes with the tokens and with K: 128 responses of 16,384 tokens with a top-64 would be 1.5 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of one answer: the sampled token's own row, an entry of a top-K (base64), as benchmarks/transport.py measures them.
BYTES_PER_TOKEN = 30
BYTES_PER_TOPK_ENTRY = 11
MAX_SEQUENCES = 128
MAX_ANSWER_BYTES = 64 << 20


def scoring_batches(
    lengths: Sequence[int], topk: int, max_sequences: int = MAX_SEQUENCES
) -> list[range]:
    """Positions of the sequences of each request, in order; every sequence is in one.

    Args:
        lengths: response tokens of each sequence.
    """
    per_token = BYTES_PER_TOKEN + BYTES_PER_TOPK_ENTRY * topk
    batches: list[range] = []
    start, size = 0, 0
    for position, length in enumerate(lengths):
        size += per_token * length
        is_full = position - start == max_sequences or size > MAX_ANSWER_BYTES
        if position > start and is_full:
            batches.append(range(start, position))
            start, size = position, per_token * length
    return [*batches, range(start, len(lengths))] if lengths else []
