"""Which packed token belongs to which sequence (or prompt group), and sums over them.

Tokens of a sequence stand in order but need not be adjacent: prompts and padding between them have
id -1.

Shape suffixes: T packed tokens, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd_megatron.losses.checks import ID_DTYPES, LossInputError, check_dtype, check_shape


@dataclass(frozen=True)
class Sequences:
    """ids_T [T] int64 in [0, num_sequences), -1 for tokens that do not count.

    Example: two responses of 2 and 1 tokens, each after a prompt token: ids_T = [-1, 0, 0, -1, 1].
    """

    ids_T: torch.Tensor
    num_sequences: int

    def __post_init__(self) -> None:
        check_dtype("ids_T", self.ids_T, ID_DTYPES)
        check_shape("ids_T", self.ids_T, ("T",))
        if self.ids_T.numel():
            low, high = (int(x) for x in torch.aminmax(self.ids_T))
            if low < -1 or high >= self.num_sequences:
                raise LossInputError(
                    f"ids_T: ids in [{low}, {high}] seen (shape {list(self.ids_T.shape)}), "
                    f"[0, {self.num_sequences - 1}] or -1 wanted"
                )

    @property
    def kept_T(self) -> torch.Tensor:
        """[T] bool."""
        return self.ids_T >= 0

    def sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """Sum of [T] values over each sequence: [B]. Values at -1 are not looked at."""
        kept = self.kept_T
        zeros = values_T.new_zeros(self.num_sequences)
        return zeros.index_add(0, self.ids_T[kept].long(), values_T[kept])

    def lengths(self, dtype: torch.dtype) -> torch.Tensor:
        """Tokens of each sequence: [B]."""
        return self.sum(torch.ones(self.ids_T.shape, dtype=dtype, device=self.ids_T.device))

    def spread(self, values_B: torch.Tensor) -> torch.Tensor:
        """The value of its sequence at every token, 0 at -1: [T]."""
        if self.num_sequences == 0:
            return values_B.new_zeros(self.ids_T.shape)
        return torch.where(
            self.kept_T, values_B[self.ids_T.clamp_min(0).long()], values_B.new_zeros(())
        )
