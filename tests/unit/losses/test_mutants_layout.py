"""Mutants of how a batch is laid out and averaged: alignment of scores, means over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from caught import caught

from opd_megatron.data.packing import MicroBatch, pack
from opd_megatron.exchange.batch_file import BatchSlice
from opd_megatron.losses.batch_plan import BatchArrays, make_plan
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import TokenInputs, make_token_loss
from opd_megatron.losses.token_stats import TokenStats

PROMPT, RESPONSES = 3, (4, 0, 1)
Pack = Callable[[], MicroBatch]


def our_packing() -> MicroBatch:
    """Three documents through the real packing; the teacher's log-prob of token v is recorded as -v."""
    tokens = tuple(
        np.arange(100 * i, 100 * i + PROMPT + length, dtype=np.int32)
        for i, length in enumerate(RESPONSES, start=1)
    )
    teacher = tuple(-ids[PROMPT:].astype(np.float32) for ids in tokens)
    batch = BatchSlice(
        step=1,
        weight_version=0,
        num_samples=3,
        indices=(0, 1, 2),
        sample_ids=("a", "b", "c"),
        tokens=tokens,
        prompt_lengths=(PROMPT,) * 3,
        behavior_logprobs=teacher,
        teacher_logprobs=teacher,
        topk_ids=None,
        topk_logprobs=None,
    )
    return pack(batch, (0, 1, 2), np.cumsum([0, *RESPONSES]), num_tokens=16)


def check_alignment(packed: Pack) -> None:
    """Every response token is scored once, at the position that predicts it."""
    micro = packed()
    scored = micro.loss_mask_T > 0
    assert int(scored.sum()) == sum(RESPONSES)
    np.testing.assert_array_equal(micro.teacher_logprobs_T[scored], -micro.target_ids_T[scored])


def shifted(by: int) -> MicroBatch:
    micro = our_packing()
    return replace(micro, teacher_logprobs_T=np.roll(micro.teacher_logprobs_T, by))


def inputs_for_targets() -> MicroBatch:
    micro = our_packing()
    return replace(micro, target_ids_T=micro.tokens_T)


def minus_zero_slice() -> MicroBatch:
    """x[-0:] is everything: an empty response takes its whole prompt."""
    micro = our_packing()
    mask_T = np.zeros_like(micro.loss_mask_T)
    ends = np.cumsum([PROMPT + length - 1 for length in RESPONSES])
    for start, end, length in zip([0, *ends], ends, RESPONSES, strict=False):
        mask_T[start:end][-length:] = 1.0
    return replace(micro, loss_mask_T=mask_T)


@pytest.mark.parametrize(
    "mutant",
    [lambda: shifted(1), lambda: shifted(-1), inputs_for_targets, minus_zero_slice],
    ids=["shifted_late", "shifted_early", "inputs_for_targets", "minus_zero_slice"],
)
def test_mutants_of_the_alignment_are_caught(mutant: Pack) -> None:
    caught(check_alignment, our_packing, mutant)


Parts = list[tuple[torch.Tensor, int, int]]  # (loss sum, kept tokens, tokens) a micro-batch
Mean = Callable[[Parts, int], torch.Tensor]


def loss_parts(cuts: list[int]) -> tuple[Parts, int]:
    """A batch through the real plan and loss, in micro-batches of the given sizes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = -torch.rand(2, 12, generator=generator, dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 0]).bool()
    ids, groups = torch.arange(12) // 3, torch.zeros(4, dtype=torch.long)
    settings = LossSettings()
    plan = make_plan(settings, BatchArrays(student, teacher, mask, ids, groups))
    inputs = TokenInputs(student, teacher, plan.mask_N)
    loss = make_token_loss(settings)
    parts: Parts = []
    for end, size in zip(np.cumsum(cuts).tolist(), cuts, strict=True):
        rows = slice(end - size, end)
        stats = TokenStats(student[rows], student[rows], student[rows])
        kept = int(plan.mask_N[rows].sum())
        parts.append((loss(stats, inputs.rows(rows)).loss_sum, kept, size))
    return parts, plan.num_kept


def check_split(mean: Mean) -> None:
    whole = mean(*loss_parts([12]))
    for cuts in ([6, 6], [1, 11], [8, 1, 3]):
        torch.testing.assert_close(mean(*loss_parts(cuts)), whole)


def global_token_mean(parts: Parts, num_kept: int) -> torch.Tensor:
    return torch.stack([loss for loss, _, _ in parts]).sum() / num_kept


def mean_of_means(parts: Parts, num_kept: int) -> torch.Tensor:
    return torch.stack([loss / max(1, kept) for loss, kept, _ in parts]).mean()


def divided_by_positions(parts: Parts, num_kept: int) -> torch.Tensor:
    return torch.stack([loss / size for loss, _, size in parts]).mean()


@pytest.mark.parametrize("mutant", [mean_of_means, divided_by_positions])
def test_means_that_depend_on_the_split_are_caught(mutant: Mean) -> None:
    caught(check_split, global_token_mean, mutant)
