"""What a backend of the row functions is given for the backward, and the precision it works in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# exp underflows to exactly 0 below -104 (float32) and -746 (float64), so a log-prob clamped here
# never changes a product p * log p, but 0 * -inf can no longer happen.
LOG_FLOOR = -1000.0


@dataclass(frozen=True)
class RowGradient:
    """What the gradient of a row needs beside its logits; all [T] or [T, J], statistics dtype.

    Attributes:
        log_z_T, entropy_T: of the whole row.
        dense_T: A = g_Z - sum_j g_j.
        grad_entropy_T: g_H.
        local_ids_TJ: int64 columns, -1 where another rank owns the id.
        logprobs_TJ: at those ids.
        grad_logprobs_TJ: g_j.
    """

    log_z_T: torch.Tensor
    entropy_T: torch.Tensor
    dense_T: torch.Tensor
    grad_entropy_T: torch.Tensor
    local_ids_TJ: torch.Tensor
    logprobs_TJ: torch.Tensor
    grad_logprobs_TJ: torch.Tensor

    def rows(self, rows: slice) -> RowGradient:
        """The same for some of the rows."""
        return RowGradient(
            self.log_z_T[rows],
            self.entropy_T[rows],
            self.dense_T[rows],
            self.grad_entropy_T[rows],
            self.local_ids_TJ[rows],
            self.logprobs_TJ[rows],
            self.grad_logprobs_TJ[rows],
        )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32
