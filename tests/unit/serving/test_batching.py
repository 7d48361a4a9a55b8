"""How sequences are dealt to requests: all of them, in order, and no answer that nobody can hold."""

from __future__ import annotations

import random

from opd_megatron.serving.batching import (
    BYTES_PER_TOKEN,
    BYTES_PER_TOPK_ENTRY,
    MAX_ANSWER_BYTES,
    scoring_batches,
)


def test_every_sequence_is_in_one_request_and_no_answer_is_large() -> None:
    rng = random.Random(0)
    for _ in range(300):
        topk, most = rng.choice((0, 16, 64, 1024)), rng.choice((1, 7, 128))
        lengths = [rng.choice((0, 5, 300, 16_384)) for _ in range(rng.randrange(40))]
        batches = scoring_batches(lengths, topk, most)
        assert [position for batch in batches for position in batch] == list(range(len(lengths)))
        for batch in batches:
            size = sum(lengths[i] for i in batch) * (BYTES_PER_TOKEN + BYTES_PER_TOPK_ENTRY * topk)
            assert 1 <= len(batch) <= most
            assert size <= MAX_ANSWER_BYTES or len(batch) == 1


def test_short_responses_go_together_and_long_ones_with_a_list_do_not() -> None:
    assert scoring_batches([20] * 200, 8) == [range(0, 128), range(128, 200)]
    assert scoring_batches([16_384] * 8, 64) == [range(0, 5), range(5, 8)]
    assert scoring_batches([16_384] * 8, 0) == [range(0, 8)]
