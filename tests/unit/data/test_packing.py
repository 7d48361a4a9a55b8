"""Packing: labels shifted once, every token exactly once, equal work on every rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_megatron.data.packing import (
    PackingPlan,
    as_rows,
    context_parallel_rows,
    document_lengths,
    pack,
    plan_by_scorer,
    plan_packing,
)
from opd_megatron.errors import ConfigError, ContractError
from opd_megatron.exchange.batch_file import (
    BatchIndex,
    BatchSlice,
    read_batch,
    read_index,
    write_batch,
)
from opd_megatron.types import Rollout, Sample, TeacherScores

EXAMPLE = [(2, 3), (4, 0), (1, 2)]


def _sample(number: int, prompt: int, response: int, topk: int = 0) -> Sample:
    first = 1000 * number
    ids = list(range(first, first + prompt + response))
    logprobs = -np.arange(1, response + 1, dtype=np.float32) - 100 * number
    support = np.arange(response * topk).reshape(response, topk)
    return Sample(
        Rollout(
            f"s{number}",
            f"p{number}",
            tuple(ids[:prompt]),
            tuple(ids[prompt:]),
            logprobs,
            "stop",
            0,
            0,
            "rollout-0",
        ),
        TeacherScores(
            "main",
            2 * logprobs,
            support.astype(np.int32) if topk else None,
            -support.astype(np.float32) if topk else None,
        ),
    )


def _written(
    folder: Path, lengths: list[tuple[int, int]], topk: int = 0
) -> tuple[BatchIndex, BatchSlice]:
    path = folder / "batch"
    write_batch(path, 0, 0, [_sample(i, p, r, topk) for i, (p, r) in enumerate(lengths)])
    return read_index(path), read_batch(path)


def test_a_position_predicts_the_next_token(tmp_path: Path) -> None:
    index, batch = _written(tmp_path, EXAMPLE)
    micro = pack(batch, [0], index.response_offsets, num_tokens=4)
    assert micro.tokens_T.tolist() == [0, 1, 2, 3]
    assert micro.target_ids_T.tolist() == [1, 2, 3, 4]
    assert micro.loss_mask_T.tolist() == [0, 1, 1, 1]
    assert micro.behavior_logprobs_T.tolist() == [0, -1, -2, -3]
    assert micro.teacher_logprobs_T.tolist() == [0, -2, -4, -6]
    assert micro.output_index_T.tolist() == [-1, 0, 1, 2]
    assert micro.cu_seqlens.tolist() == [0, 4]


def test_documents_are_padded_and_the_rest_is_filled(tmp_path: Path) -> None:
    index, batch = _written(tmp_path, EXAMPLE)
    micro = pack(batch, [0, 2], index.response_offsets, num_tokens=16, document_multiple=4)
    assert micro.cu_seqlens.tolist() == [0, 4, 8, 12, 16]
    assert micro.position_ids_T.tolist() == [0, 1, 2, 3] * 4
    assert micro.tokens_T[4:8].tolist() == [2000, 2001, 0, 0]
    assert micro.output_index_T[4:8].tolist() == [3, 4, -1, -1]
    assert micro.loss_mask_T.sum() == 5
    assert micro.max_document_length == 4


def test_documents_of_a_padded_batch_are_rows_as_long_as_the_longest(tmp_path: Path) -> None:
    index, batch = _written(tmp_path, [(2, 4), (4, 0), (1, 2), (3, 7), (2, 2)])
    lengths, row = as_rows(document_lengths(index, 4), multiple=6)
    assert (lengths, row) == ([12, 0, 12, 12, 12], 12)
    plan = plan_packing(lengths, 1, tokens_per_microbatch=30, token_multiple=row)
    assert (plan.num_tokens, plan.num_micro_batches) == (24, 2)  # two rows fit, half a row is left
    for samples in plan.samples[0]:
        micro = pack(batch, samples, index.response_offsets, plan.num_tokens, row)
        assert micro.cu_seqlens.tolist() == [0, 12, 24]
        rows = micro.tokens_T.reshape(2, row)
        assert [ids[0] for ids in rows] == [batch.tokens[number][0] for number in samples]


def test_a_padded_batch_without_response_tokens_has_rows_of_the_smallest_length() -> None:
    assert as_rows([0, 0], multiple=8) == ([0, 0], 8)


def test_an_empty_micro_batch_has_one_document_without_mask(tmp_path: Path) -> None:
    index, batch = _written(tmp_path, EXAMPLE)
    micro = pack(batch, [], index.response_offsets, num_tokens=8, document_multiple=4)
    assert micro.cu_seqlens.tolist() == [0, 8]
    assert micro.loss_mask_T.sum() == 0 and (micro.output_index_T == -1).all()


def test_a_slice_packs_like_the_whole_batch(tmp_path: Path) -> None:
    index, batch = _written(tmp_path, EXAMPLE)
    part = read_batch(tmp_path / "batch", [2])
    a = pack(batch, [2], index.response_offsets, num_tokens=4)
    b = pack(part, [2], index.response_offsets, num_tokens=4)
    assert np.array_equal(a.tokens_T, b.tokens_T)
    assert np.array_equal(a.output_index_T, b.output_index_T)


def test_teacher_support_rows_follow_their_tokens(tmp_path: Path) -> None:
    index, batch = _written(tmp_path, EXAMPLE, topk=2)
    micro = pack(batch, [0], index.response_offsets, num_tokens=4)
    assert micro.topk_ids_TK is not None and micro.topk_logprobs_TK is not None
    assert micro.topk_ids_TK.tolist() == [[0, 0], [0, 1], [2, 3], [4, 5]]
    assert micro.topk_logprobs_TK[3].tolist() == [-4.0, -5.0]


def test_empty_responses_have_no_document(tmp_path: Path) -> None:
    index, _ = _written(tmp_path, EXAMPLE)
    assert document_lengths(index, 1) == [4, 0, 2]
    assert document_lengths(index, 4) == [4, 0, 4]


def test_a_response_without_prompt_is_refused(tmp_path: Path) -> None:
    index, _ = _written(tmp_path, [(0, 3)])
    with pytest.raises(ContractError, match="sample s0: a response needs >= 1 prompt token"):
        document_lengths(index, 1)


def test_the_longest_sample_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"batch.tokens_per_microbatch=100: .* 101 .* 102"):
        plan_packing([5, 101], dp_size=1, tokens_per_microbatch=100, token_multiple=2)


def test_more_ranks_than_samples_get_empty_micro_batches() -> None:
    plan = plan_packing([3], dp_size=4, tokens_per_microbatch=8)
    assert plan == PackingPlan(samples=(((0,),), ((),), ((),), ((),)), num_tokens=3, scorers=("",))


def test_a_batch_without_response_tokens_still_runs_one_micro_batch() -> None:
    plan = plan_packing([0, 0], dp_size=2, tokens_per_microbatch=64, token_multiple=4)
    assert plan == PackingPlan(samples=(((),), ((),)), num_tokens=4, scorers=("",))


@given(
    lengths=st.lists(st.integers(0, 40), max_size=60),
    dp_size=st.integers(1, 5),
    capacity=st.integers(48, 200),
    multiple=st.sampled_from([1, 2, 4, 8]),
    groups_of=st.integers(1, 4),
)
def test_plans_hold_every_document_once_within_the_limit(
    lengths: list[int], dp_size: int, capacity: int, multiple: int, groups_of: int
) -> None:
    plan = plan_packing(lengths, dp_size, capacity, multiple, groups_of)
    assert plan.num_micro_batches % groups_of == 0
    packed = [i for rank in range(dp_size) for i in plan.of_rank(rank)]
    assert sorted(packed) == [i for i, n in enumerate(lengths) if n]
    assert {len(rank) for rank in plan.samples} == {plan.num_micro_batches}
    assert plan.num_tokens <= capacity and plan.num_tokens % multiple == 0
    loads = [sum(lengths[i] for i in micro) for rank in plan.samples for micro in rank]
    assert max(loads) <= plan.num_tokens
    assert plan == plan_packing(lengths, dp_size, capacity, multiple, groups_of)


@given(
    documents=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["", "math", "code"])), max_size=40
    ),
    dp_size=st.integers(1, 3),
    groups_of=st.integers(1, 3),
)
def test_samples_of_different_scorers_never_share_a_micro_batch(
    documents: list[tuple[int, str]], dp_size: int, groups_of: int
) -> None:
    lengths, scorers = [n for n, _ in documents], [name for _, name in documents]
    plan = plan_by_scorer(lengths, scorers, dp_size, 64, 2, groups_of)
    assert len(plan.scorers) == plan.num_micro_batches
    packed = []
    for rank in plan.samples:
        assert len(rank) == plan.num_micro_batches
        for micro, scorer in zip(rank, plan.scorers, strict=True):
            assert {scorers[i] for i in micro} <= {scorer}
            assert sum(lengths[i] for i in micro) <= plan.num_tokens <= 64
            packed += micro
    assert sorted(packed) == [i for i, n in enumerate(lengths) if n]
    # The interleaved schedule runs a teacher's micro-batches alone, in whole groups.
    assert all(plan.scorers.count(name) % groups_of == 0 for name in plan.scorers)
    if len(set(scorers)) == 1:
        alone = plan_packing(lengths, dp_size, 64, 2, groups_of, scorers[0])
        assert plan == alone


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12),
    dp_size=st.integers(1, 3),
    cp_size=st.sampled_from([1, 2, 4]),
)
def test_every_response_token_comes_back_to_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[tuple[int, int]],
    dp_size: int,
    cp_size: int,
) -> None:
    index, batch = _written(tmp_path_factory.mktemp("batch"), lengths)
    multiple = 2 * cp_size if cp_size > 1 else 1
    plan = plan_packing(document_lengths(index, multiple), dp_size, 64, multiple)
    total = index.num_response_tokens
    targets, behavior = np.full(total, -1), np.zeros(total, dtype=np.float32)
    times = np.zeros(total, dtype=int)
    for rank in plan.samples:
        for samples in rank:
            micro = pack(batch, samples, index.response_offsets, plan.num_tokens, multiple)
            for cp_rank in range(cp_size):
                rows = context_parallel_rows(micro.cu_seqlens.tolist(), cp_size, cp_rank)
                rows = rows[micro.loss_mask_T[rows] > 0]
                where = micro.output_index_T[rows]
                targets[where] = micro.target_ids_T[rows]
                behavior[where] = micro.behavior_logprobs_T[rows]
                times[where] += 1
    responses = [t[p:] for t, p in zip(batch.tokens, batch.prompt_lengths, strict=True)]
    assert (times == 1).all()
    assert np.array_equal(targets, np.concatenate(responses))
    assert np.array_equal(behavior, np.concatenate(batch.behavior_logprobs))


def test_context_parallel_ranks_hold_mirrored_pieces() -> None:
    borders = [0, 8, 12]
    assert context_parallel_rows(borders, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_parallel_rows(borders, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert context_parallel_rows(borders, 1, 0).tolist() == list(range(12))


def test_a_rank_without_samples_packs_as_many_teacher_entries_as_the_others(tmp_path: Path) -> None:
    rollout = Rollout("s0", "p0", (1,), (2, 3), np.zeros(2, np.float32), "stop", 0, 0, "rollout-0")
    ids = np.array([[4, 5, 6], [7, 8, 9]], np.int32)
    scores = TeacherScores("main", np.zeros(2, np.float32), ids, np.zeros((2, 3), np.float32))
    write_batch(tmp_path / "batch", step=1, weight_version=0, samples=[Sample(rollout, scores)])
    index = read_index(tmp_path / "batch")
    for samples in ([0], []):
        batch = read_batch(tmp_path / "batch", samples)
        micro = pack(batch, samples, index.response_offsets, num_tokens=4)
        assert micro.topk_ids_TK is not None and micro.topk_logprobs_TK is not None
        assert micro.topk_ids_TK.shape == micro.topk_logprobs_TK.shape == (4, 3)
