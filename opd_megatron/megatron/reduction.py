"""Metrics and trouble of a step, made global with at most three collectives.

Sums and maxima of the micro-batches become one float64 vector each: a SUM and a MAX over data- and
context-parallel ranks, and one broadcast from the last pipeline stage. Trouble is a maximum too:
the batch row of a bad value plus one, per kind, so that every rank knows the same culprit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.token_loss import TokenInputs, TokenLossOutput
from opd_megatron.losses.token_stats import TokenStats
from opd_megatron.megatron.parallel import Groups

# In the order in which they are reported: an input explains a bad loss.
TROUBLES = (
    "behavior log-prob",
    "teacher log-prob",
    "student log-prob",
    "student entropy",
    "loss",
)


@dataclass(frozen=True)
class MicroReport:
    """What one micro-batch contributes.

    `trouble_rows` [len(TROUBLES)]: batch row + 1 of a bad value of each kind, else 0.
    """

    sums: dict[str, tuple[torch.Tensor, torch.Tensor]]
    maxes: dict[str, torch.Tensor]
    trouble_rows: torch.Tensor


@dataclass(frozen=True)
class GlobalReport:
    """The same on every rank."""

    sums: dict[str, tuple[float, float]]
    maxes: dict[str, float]
    trouble: tuple[str, int] | None  # kind, batch row


def micro_report(
    stats: TokenStats,
    inputs: TokenInputs,
    output: TokenLossOutput,
    output_index_T: torch.Tensor,
) -> MicroReport:
    """Collect sums, maxima and bad rows of one micro-batch, without waiting for the device."""
    kept_T = inputs.mask_T.bool()
    loss_T = output.weights_T * output.advantages_T  # bad where the loss of a token is
    bad = torch.stack(
        [
            ~torch.isfinite(inputs.behavior_logprobs_T),
            # A teacher may call a token impossible (-inf): the loss bounds the log-ratio.
            torch.isnan(inputs.teacher_logprobs_T) | (inputs.teacher_logprobs_T == torch.inf),
            ~torch.isfinite(stats.sampled_logprobs_T.detach()),
            ~torch.isfinite(stats.entropy_T.detach()),
            ~torch.isfinite(loss_T),
        ]
    )
    rows = torch.where(bad & kept_T, output_index_T + 1, torch.zeros_like(output_index_T))
    loss_sum = output.loss_sum.detach()
    sums = {**output.sums, "train/loss": (loss_sum, output.token_count)}
    return MicroReport(sums=sums, maxes=output.maxes, trouble_rows=rows.amax(dim=1))


def make_global(
    reports: Sequence[MicroReport],
    sum_names: Sequence[str],
    max_names: Sequence[str],
    groups: Groups,
    device: torch.device,
) -> GlobalReport:
    """Combine the reports of all micro-batches and ranks.

    Args:
        reports: of this rank; empty on pipeline stages that compute no loss.
        sum_names, max_names: the same on every rank; their order is the layout of the vectors.

    Returns:
        GlobalReport, equal on all ranks.
    """
    num_sums, num_maxes = 2 * len(sum_names), len(max_names)
    sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
    maxes = torch.zeros(num_maxes + len(TROUBLES), dtype=torch.float64, device=device)
    for report in reports:
        pairs = [part for name in sum_names for part in report.sums[name]]
        sums += torch.stack([part.double() for part in pairs])
        tops = [report.maxes[name].double() for name in max_names]
        maxes = torch.maximum(maxes, torch.cat([torch.stack(tops), report.trouble_rows.double()]))
    if groups.dp_cp.size() > 1:
        dist.all_reduce(sums, group=groups.dp_cp)
        dist.all_reduce(maxes, op=dist.ReduceOp.MAX, group=groups.dp_cp)
    packed = torch.cat([sums, maxes])
    if groups.pp.size() > 1:
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(packed, src=last, group=groups.pp)
    values = packed.tolist()
    rows = values[num_sums + num_maxes :]
    trouble = next(
        ((kind, int(row) - 1) for kind, row in zip(TROUBLES, rows, strict=True) if row > 0), None
    )
    return GlobalReport(
        sums={n: (values[2 * i], values[2 * i + 1]) for i, n in enumerate(sum_names)},
        maxes=dict(zip(max_names, values[num_sums : num_sums + num_maxes], strict=True)),
        trouble=trouble,
    )
