"""The sparse part of a row gradient: final values at the wanted ids, written over the dense part.

A kernel that streams dz = scale * p (A - g_H (log p + H)) to memory in the logits' dtype can not add
g_j to it afterwards without rounding twice. The whole value at id j is known without reading the
logits again, because log p_j is an output of the forward:

    dz_j = scale * (p_j (A - g_H (log p_j + H)) + sum of g over the entries with the same id)

so it is computed in the statistics' dtype and stored once. Entries with equal ids store equal values.
"""

from __future__ import annotations

import torch

from opd_megatron.losses.fused.row_gradient import LOG_FLOOR, RowGradient


def summed_over_duplicates(ids_TJ: torch.Tensor, values_TJ: torch.Tensor) -> torch.Tensor:
    """At every entry the sum of the values with the same id in its row, [T, J]."""
    if ids_TJ.shape[1] < 2:
        return values_TJ
    sorted_ids_TJ, order_TJ = ids_TJ.sort(dim=1)
    new_TJ = torch.zeros_like(order_TJ)
    new_TJ[:, 1:] = (sorted_ids_TJ[:, 1:] != sorted_ids_TJ[:, :-1]).long()
    # rank_TJ[t, j]: which of the row's distinct ids entry j holds, in the original order.
    rank_TJ = torch.empty_like(order_TJ).scatter_(1, order_TJ, new_TJ.cumsum(1))
    totals_TJ = torch.zeros_like(values_TJ).scatter_add_(1, rank_TJ, values_TJ)
    return totals_TJ.gather(1, rank_TJ)


def support_gradient(row: RowGradient) -> torch.Tensor:
    """p_j (A - g_H (log p_j + H)) at every entry, [T, J]: what the dense part has there."""
    centered_TJ = row.logprobs_TJ.clamp_min(LOG_FLOOR) + row.entropy_T[:, None]
    dense_TJ = row.dense_T[:, None] - row.grad_entropy_T[:, None] * centered_TJ
    return row.logprobs_TJ.exp() * dense_TJ


def write_support_gradient(
    out_TV: torch.Tensor, row: RowGradient, dense_TJ: torch.Tensor, scale: float
) -> None:
    """Store scale * (dense_TJ + sums of g) at the ids that this rank owns."""
    ids_TJ = row.local_ids_TJ
    values_TJ = scale * (dense_TJ + summed_over_duplicates(ids_TJ, row.grad_logprobs_TJ))
    tokens, entries = (ids_TJ >= 0).nonzero(as_tuple=True)
    columns = ids_TJ[tokens, entries]
    out_TV[tokens, columns] = values_TJ[tokens, entries].to(out_TV.dtype)
