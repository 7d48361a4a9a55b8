"""Micro-batches through the model: onto the device, through Megatron's schedule, and back.

Every rank plans the same packing from the batch's offsets, reads its own samples only, and runs the
same number of equally long micro-batches, so any schedule (none, 1F1B) can run them. Under context
parallel a rank holds two zig-zag pieces of every document. Per-token results leave in batch order.

The model sees [B, S]: one row of documents that lie end to end (thd), or, padded, a row a document.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from opd_megatron.config.schema import BatchConfig
from opd_megatron.data.packing import (
    MicroBatch,
    as_rows,
    context_parallel_rows,
    document_lengths,
    pack,
    plan_by_scorer,
)
from opd_megatron.errors import ContractError
from opd_megatron.exchange.batch_file import BatchIndex, BatchSlice
from opd_megatron.exchange.beats import Mark, unwatched
from opd_megatron.megatron.layout import Layout
from opd_megatron.megatron.parallel import Groups
from opd_megatron.teacher.target import is_inside


@dataclass(frozen=True)
class MicroResult:
    """`loss_sum` carries the gradient, `count` is its share of the divisor, `values` [T] are for the records."""

    loss_sum: torch.Tensor
    count: torch.Tensor
    values: dict[str, torch.Tensor]


# (what the last stage returns, micro-batch) -> result; see output_head.py
MicroFunction = Callable[[torch.Tensor, "DeviceMicroBatch"], MicroResult]


@dataclass(frozen=True)
class DeviceMicroBatch:
    """This rank's part of a micro-batch. Suffix T: tokens of this context-parallel rank, row by row; K: teacher top-K.

    documents: None where every row is one.
    """

    tokens_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    documents: PackedSeqParams | None
    target_ids_T: torch.Tensor
    behavior_logprobs_T: torch.Tensor
    teacher_logprobs_T: torch.Tensor
    output_index_T: torch.Tensor  # row in batch order, -1 where there is no response token
    topk_ids_TK: torch.Tensor | None
    topk_logprobs_TK: torch.Tensor | None
    number: int
    scorer: str


@dataclass(frozen=True)
class MicroOutput:
    """What the last pipeline stage keeps of a micro-batch, detached."""

    values: dict[str, torch.Tensor]
    output_index_T: torch.Tensor


def to_device(micro: MicroBatch, groups: Groups, device: torch.device) -> DeviceMicroBatch:
    """Move this context-parallel rank's rows to the device."""
    rows = context_parallel_rows(micro.cu_seqlens.tolist(), groups.cp.size(), groups.cp.rank())

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[rows])).to(device)

    return DeviceMicroBatch(
        tokens_BS=tensor(micro.tokens_T).view(_num_rows(micro), -1),
        position_ids_BS=tensor(micro.position_ids_T).view(_num_rows(micro), -1),
        documents=None if micro.row_length else _documents(micro, device),
        target_ids_T=tensor(micro.target_ids_T),
        behavior_logprobs_T=tensor(micro.behavior_logprobs_T),
        teacher_logprobs_T=tensor(micro.teacher_logprobs_T),
        output_index_T=tensor(micro.output_index_T),
        topk_ids_TK=None if micro.topk_ids_TK is None else tensor(micro.topk_ids_TK),
        topk_logprobs_TK=None if micro.topk_logprobs_TK is None else tensor(micro.topk_logprobs_TK),
        number=micro.number,
        scorer=micro.scorer,
    )


def _num_rows(micro: MicroBatch) -> int:
    return micro.num_tokens // (micro.row_length or micro.num_tokens)


def _documents(micro: MicroBatch, device: torch.device) -> PackedSeqParams:
    borders = torch.from_numpy(micro.cu_seqlens).to(device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=micro.max_document_length,
        max_seqlen_kv=micro.max_document_length,
    )


def pack_for_rank(
    index: BatchIndex,
    read: Callable[[Sequence[int]], BatchSlice],
    layout: Layout,
    groups: Groups,
    settings: BatchConfig,
    vocab_size: int,
    in_process: Collection[str] = (),
) -> list[MicroBatch]:
    """Plan the whole batch, read and pack this data-parallel rank's part.

    Args:
        in_process: the teachers inside the learner.

    Raises:
        ConfigError: a sample is longer than a micro-batch.
        ContractError: a token is outside the vocabulary.
    """
    document_multiple, token_multiple = layout.document_multiple, layout.token_multiple
    lengths = document_lengths(index, document_multiple)
    row_length = 0
    if settings.padded:
        lengths, row_length = as_rows(lengths, token_multiple)
        document_multiple = token_multiple = row_length
    plan = plan_by_scorer(
        lengths,
        [name if is_inside(name, in_process) else "" for name in index.teachers],
        layout.dp,
        settings.tokens_per_microbatch,
        token_multiple,
        layout.micro_batch_multiple,
    )
    batch = read(plan.of_rank(groups.dp.rank()))
    for sample_id, tokens in zip(batch.sample_ids, batch.tokens, strict=True):
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ContractError(f"sample {sample_id}: a token is outside [0, {vocab_size})")
    packed = (
        pack(batch, samples, index.response_offsets, plan.num_tokens, document_multiple)
        for samples in plan.samples[groups.dp.rank()]
    )
    return [
        replace(micro, row_length=row_length, number=number, scorer=scorer)
        for number, (micro, scorer) in enumerate(zip(packed, plan.scorers, strict=True))
    ]


def run_micro_batches(
    models: Sequence[torch.nn.Module],
    groups: Groups,
    micro_batches: Sequence[MicroBatch],
    function: MicroFunction,
    *,
    forward_only: bool,
    mark: Mark = unwatched,
) -> list[MicroOutput]:
    """Forward, and backward unless `forward_only`, over all micro-batches of this rank.

    Args:
        mark: told which micro-batch begins.

    Returns:
        One output per micro-batch on the last pipeline stage, nothing on others.
    """
    device = next(models[0].parameters()).device
    is_interleaved = len(models) > 1
    num_rows = _num_rows(micro_batches[0])

    def forward_step(
        batches: Iterator[MicroBatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        micro = next(batches)
        mark(f"micro-batch {micro.number + 1} of {len(micro_batches)}")
        batch = to_device(micro, groups, device)
        output = module(
            batch.tokens_BS, batch.position_ids_BS, None, packed_seq_params=batch.documents
        )

        def loss(output: torch.Tensor) -> Any:
            result = function(output, batch)
            values = {name: value.detach() for name, value in result.values.items()}
            kept = MicroOutput(values, batch.output_index_T)
            return result.loss_sum, result.count.to(torch.int), kept

        return output, loss

    with torch.set_grad_enabled(not forward_only):
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            # Every chunk of a virtual pipeline reads all micro-batches.
            data_iterator=(
                [iter(micro_batches) for _ in models] if is_interleaved else iter(micro_batches)
            ),
            model=list(models) if is_interleaved else models[0],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].num_tokens // num_rows,
            micro_batch_size=num_rows,
            forward_only=forward_only,
        )
    return outputs if groups.is_last_stage else []


def in_batch_order(
    outputs: Sequence[MicroOutput],
    names: Sequence[str],
    num_response_tokens: int,
    groups: Groups,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Per-token values of the whole batch, [sum L] float32 each.

    Summed over data- and context-parallel ranks (each token is computed by one of them), then sent
    from the last pipeline stage to the others.
    """
    flat = torch.zeros(len(names), num_response_tokens, device=device)
    for output in outputs:
        kept = output.output_index_T >= 0
        rows = output.output_index_T[kept]
        for i, name in enumerate(names):
            flat[i, rows] = output.values[name].float()[kept]
    if groups.dp_cp.size() > 1:
        dist.all_reduce(flat, group=groups.dp_cp)
    if groups.pp.size() > 1:
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(flat, src=last, group=groups.pp)
    return {name: flat[i].cpu() for i, name in enumerate(names)}
