"""Step batches to packed micro-batches. The only place where labels are shifted.

A sample with prompt P and response L tokens becomes one document of P + L - 1 inputs: position t
holds token t and predicts token t + 1, so the last token is a target only.

    tokens      p0 p1 r0 r1        of p0 p1 r0 r1 r2
    targets     p1 r0 r1 r2
    loss mask    0  1  1  1        response position of the target: -, 0, 1, 2

Documents are laid end to end ("thd"); `cu_seqlens` holds their padded borders. Which documents go
together is planned from lengths alone, so every rank computes the same plan: longest first into the
emptiest bin, the number of bins a multiple of the data-parallel size. All micro-batches of a step
have the same length T and all data-parallel ranks the same number of them; what is missing is
filled with documents of zero mask. In a padded batch every document is as long as the longest of the
step and is a row. Samples without a response contribute nothing and are not packed. Samples that
different models inside the learner score are packed apart, so that a model runs over its own
micro-batches only.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_megatron.errors import ConfigError, ContractError
from opd_megatron.exchange.batch_file import BatchIndex, BatchSlice


@dataclass(frozen=True)
class MicroBatch:
    """Packed documents. Suffixes: T packed tokens, D documents, K teacher support.

    `output_index_T` is the row of position t in arrays of all response tokens in batch order (the
    order of `behavior_logprobs` in the batch file), -1 where the mask is 0.
    """

    tokens_T: NDArray[np.int64]
    position_ids_T: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]  # [D + 1]
    target_ids_T: NDArray[np.int64]
    loss_mask_T: NDArray[np.float32]
    behavior_logprobs_T: NDArray[np.float32]
    teacher_logprobs_T: NDArray[np.float32]
    output_index_T: NDArray[np.int64]
    topk_ids_TK: NDArray[np.int64] | None
    topk_logprobs_TK: NDArray[np.float32] | None
    row_length: int = 0  # of every row of a padded batch; 0: packed, one row
    number: int = 0  # among the micro-batches of its data-parallel rank
    scorer: str = ""  # the teacher inside the learner that its samples need, if any

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def max_document_length(self) -> int:
        return int(np.diff(self.cu_seqlens).max())


@dataclass(frozen=True)
class PackingPlan:
    """`samples[rank][micro_batch]` are sample numbers; every micro-batch has `num_tokens` rows.

    `scorers[micro_batch]`: as in `MicroBatch`.
    """

    samples: tuple[tuple[tuple[int, ...], ...], ...]
    num_tokens: int
    scorers: tuple[str, ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.samples[0])

    def of_rank(self, dp_rank: int) -> tuple[int, ...]:
        """All samples that a data-parallel rank packs."""
        return tuple(i for micro in self.samples[dp_rank] for i in micro)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def document_lengths(index: BatchIndex, document_multiple: int) -> list[int]:
    """Padded document length of every sample, 0 for a sample without response.

    Raises:
        ContractError: a response without any prompt token has no position that predicts its first
            token.
    """
    lengths = []
    responses = np.diff(index.response_offsets)
    for i, (tokens, prompt, response) in enumerate(
        zip(np.diff(index.sample_offsets), index.prompt_lengths, responses, strict=True)
    ):
        if tokens != prompt + response:
            raise ContractError(
                f"sample {index.sample_ids[i]}: {tokens} tokens are not {prompt} prompt + "
                f"{response} response tokens"
            )
        if response and not prompt:
            raise ContractError(f"sample {index.sample_ids[i]}: a response needs >= 1 prompt token")
        lengths.append(round_up(int(tokens) - 1, document_multiple) if response else 0)
    return lengths


def as_rows(lengths: Sequence[int], multiple: int) -> tuple[list[int], int]:
    """Documents of a padded batch: all as long as the longest, in a multiple of `multiple`; and that length.

    With it as document multiple and token multiple, everything below makes rows of it.
    """
    row = round_up(max([1, *lengths]), multiple)
    return [row if length else 0 for length in lengths], row


def _fill_bins(lengths: Sequence[int], num_bins: int) -> tuple[list[list[int]], int]:
    """Longest first into the emptiest bin, ties by number. Returns bins and the largest load."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, b) for b in range(num_bins)]
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(loads)
        bins[b].append(i)
        heapq.heappush(loads, (load + lengths[i], b))
    return bins, max(load for load, _ in loads)


def plan_packing(
    lengths: Sequence[int],
    dp_size: int,
    tokens_per_microbatch: int,
    token_multiple: int = 1,
    micro_batch_multiple: int = 1,
    scorer: str = "",
) -> PackingPlan:
    """Assign documents to data-parallel ranks and micro-batches.

    Args:
        lengths: padded document lengths, 0 for a sample that is left out.
        dp_size: number of data-parallel ranks.
        tokens_per_microbatch: upper bound of positions in a micro-batch, filling included.
        token_multiple: T is a multiple of this.
        micro_batch_multiple: the number of micro-batches of a rank is a multiple of this.
        scorer: of all of them.

    Returns:
        A plan that depends on the arguments only.

    Raises:
        ConfigError: a document, or one multiple, does not fit into a micro-batch.
    """
    capacity = tokens_per_microbatch // token_multiple * token_multiple
    longest = max(lengths, default=0)
    if longest > capacity or capacity == 0:
        raise ConfigError.of(
            "batch.tokens_per_microbatch",
            tokens_per_microbatch,
            f"the longest sample of the step needs {max(longest, 1)} positions, in multiples of "
            f"{token_multiple}",
            f"raise it to at least {round_up(max(longest, 1), token_multiple)}",
        )
    needed = max(1, -(-sum(lengths) // (dp_size * capacity)))
    num_micro = round_up(needed, micro_batch_multiple)
    bins, load = _fill_bins(lengths, num_micro * dp_size)
    while load > capacity:
        num_micro += micro_batch_multiple
        bins, load = _fill_bins(lengths, num_micro * dp_size)
    ranks = tuple(tuple(tuple(sorted(b)) for b in bins[r::dp_size]) for r in range(dp_size))
    return PackingPlan(
        samples=ranks,
        num_tokens=round_up(max(load, 1), token_multiple),
        scorers=(scorer,) * num_micro,
    )


def plan_by_scorer(
    lengths: Sequence[int],
    scorers: Sequence[str],
    dp_size: int,
    tokens_per_microbatch: int,
    token_multiple: int = 1,
    micro_batch_multiple: int = 1,
) -> PackingPlan:
    """`plan_packing` for the samples of each scorer, one after the other.

    Args:
        scorers: of every sample, "" where its scores came with the batch.

    Raises:
        ConfigError: as `plan_packing`.
    """
    plans = [
        plan_packing(
            [n if own == scorer else 0 for n, own in zip(lengths, scorers, strict=True)],
            dp_size,
            tokens_per_microbatch,
            token_multiple,
            micro_batch_multiple,
            scorer,
        )
        for scorer in sorted(set(scorers)) or [""]
    ]
    return PackingPlan(
        samples=tuple(
            tuple(micro for plan in plans for micro in plan.samples[rank])
            for rank in range(dp_size)
        ),
        num_tokens=max(plan.num_tokens for plan in plans),
        scorers=tuple(scorer for plan in plans for scorer in plan.scorers),
    )


def _borders(lengths: list[int], num_tokens: int, document_multiple: int) -> NDArray[np.int32]:
    """Borders of the documents, then of filling that is never longer than the longest of them."""
    longest = max(lengths, default=0) or num_tokens
    borders = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
    assert num_tokens % document_multiple == 0
    while borders[-1] < num_tokens:
        borders.append(min(borders[-1] + longest, num_tokens))
    return np.asarray(borders, dtype=np.int32)


def pack(
    batch: BatchSlice,
    samples: Sequence[int],
    response_offsets: NDArray[np.int64],
    num_tokens: int,
    document_multiple: int = 1,
) -> MicroBatch:
    """Lay the documents of `samples` end to end.

    Args:
        batch: a slice that holds at least `samples`.
        samples: numbers of samples in the whole batch, each with a response.
        response_offsets: [N + 1] of the whole batch.
        num_tokens: T.
        document_multiple: documents are padded to a multiple of this (with token 0 and mask 0;
            causal attention keeps padding after a document from touching it).

    Returns:
        One micro-batch of exactly T positions.
    """
    place = {number: i for i, number in enumerate(batch.indices)}
    lengths = [round_up(len(batch.tokens[place[s]]) - 1, document_multiple) for s in samples]
    borders = _borders(lengths, num_tokens, document_multiple)
    tokens_T, targets_T = np.zeros((2, num_tokens), dtype=np.int64)
    mask_T, behavior_T, teacher_T = np.zeros((3, num_tokens), dtype=np.float32)
    output_index_T = np.full(num_tokens, -1, dtype=np.int64)
    starts_T = np.repeat(borders[:-1], np.diff(borders))
    topk_ids_TK = topk_logprobs_TK = None
    if batch.num_topk:
        topk_ids_TK = np.zeros((num_tokens, batch.num_topk), dtype=np.int64)
        topk_logprobs_TK = np.zeros((num_tokens, batch.num_topk), dtype=np.float32)
    for sample, start in zip(samples, borders, strict=False):  # borders go on with the filling
        i = place[sample]
        length = len(batch.tokens[i]) - 1
        document = slice(start, start + length)
        tokens_T[document] = batch.tokens[i][:-1]
        targets_T[document] = batch.tokens[i][1:]
        response = slice(start + batch.prompt_lengths[i] - 1, start + length)
        mask_T[response] = 1.0
        behavior_T[response] = batch.behavior_logprobs[i]
        teacher_T[response] = batch.teacher_logprobs[i]
        output_index_T[response] = np.arange(
            response_offsets[sample], response_offsets[sample + 1], dtype=np.int64
        )
        if topk_ids_TK is not None and topk_logprobs_TK is not None:
            assert batch.topk_ids is not None and batch.topk_logprobs is not None
            topk_ids_TK[response] = batch.topk_ids[i]
            topk_logprobs_TK[response] = batch.topk_logprobs[i]
    return MicroBatch(
        tokens_T=tokens_T,
        position_ids_T=np.arange(num_tokens, dtype=np.int64) - starts_T,
        cu_seqlens=borders,
        target_ids_T=targets_T,
        loss_mask_T=mask_T,
        behavior_logprobs_T=behavior_T,
        teacher_logprobs_T=teacher_T,
        output_index_T=output_index_T,
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=topk_logprobs_TK,
    )


def context_parallel_rows(borders: Sequence[int], cp_size: int, cp_rank: int) -> NDArray[np.int64]:
    """Packed positions that a context-parallel rank holds, in its order.

    Every document is cut into 2 * cp equal pieces; rank r holds pieces r and 2 * cp - 1 - r, which
    balances causal attention.

    Args:
        borders: [D + 1] document borders, each document a multiple of 2 * cp (any length for cp 1).
        cp_size: context-parallel size.
        cp_rank: rank in that group.

    Returns:
        [T / cp] positions.
    """
    if cp_size == 1:
        return np.arange(borders[-1], dtype=np.int64)
    pieces = []
    for start, end in itertools.pairwise(borders):
        piece = (end - start) // (2 * cp_size)
        assert piece * 2 * cp_size == end - start
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            pieces.append(np.arange(start + number * piece, start + (number + 1) * piece))
    return np.concatenate(pieces).astype(np.int64)
