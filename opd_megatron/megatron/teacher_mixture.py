"""A mean of teachers inside the learner, as one more output layer: exact on the whole vocabulary and every support.

Each member keeps its hidden states and output weight as a teacher alone does (`teacher_pass.py`). When logits are asked
for, every member makes its own of those rows, and `losses/mixtures.py` makes one of them: rows of M + 1 logits exist at
a time, and nothing new leaves a vocabulary shard but one log Z a row and member.

Shape suffixes: T tokens, H hidden of a member, X hidden of all members side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from opd_megatron.losses.mixtures import mixed_logits
from opd_megatron.losses.teacher_logits import LocalLogits
from opd_megatron.megatron.teacher_model import TeacherHead
from opd_megatron.teacher.target import Target


@dataclass(frozen=True)
class MixedHead:
    """`heads` in the order of the target's members; has the methods of a `TeacherHead` that a loss calls."""

    target: Target
    heads: tuple[TeacherHead, ...]

    @property
    def temperature(self) -> float:
        """A mean is of distributions at temperature 1 (`launch/contracts.py`)."""
        return 1.0

    @torch.no_grad()
    def logits(self, hidden_TX: torch.Tensor) -> LocalLogits:
        """This rank's shard of the logits of the mean."""
        sizes = [head.weight_VH.shape[1] for head in self.heads]
        logits = [
            head.logits(hidden_TH)
            for head, hidden_TH in zip(self.heads, hidden_TX.split(sizes, dim=1), strict=True)
        ]
        mixed_TV = mixed_logits(
            self.target.mean,
            [weight for _, weight in self.target.weights],
            [one.local_logits_TV for one in logits],
            [one.log_z() for one in logits],
        )
        first = self.heads[0]
        return LocalLogits(mixed_TV, first.vocab_size, first.groups.tp_or_none, first.backend)

    def chunks(self, hidden_TX: torch.Tensor) -> Iterator[tuple[slice, LocalLogits]]:
        """As of a `TeacherHead`; chunks as large as those of the member with the smallest."""
        step = min(head.chunk_rows for head in self.heads)
        for start in range(0, len(hidden_TX), step):
            rows = slice(start, min(start + step, len(hidden_TX)))
            yield rows, self.logits(hidden_TX[rows])
