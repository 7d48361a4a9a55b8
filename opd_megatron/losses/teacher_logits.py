"""What a loss needs of a teacher whose logits are here: any ids' log-probs, exactly, from its vocabulary shards.

A teacher inside the learner holds the student's ids [r * v, (r + 1) * v) on tensor-parallel rank r,
so nothing larger than the support leaves a shard: its statistics cost the two all-reduces of
`token_stats`, its top-K one all-gather of [T, K], and its log-probs at the ids of any support
(the student's choice, a union) two more all-reduces. Everything is a constant; no gradient is kept.
The divergence over the whole vocabulary is `fused.dense`.

Shape suffixes: T tokens, V vocabulary (`local_`: this rank's shard), K entries of one side, J
entries of the support.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.fused.rows import Backend
from opd_megatron.losses.fused.shard import make_shard
from opd_megatron.losses.supports import Support, SupportSources, make_support
from opd_megatron.losses.token_loss import SupportInputs
from opd_megatron.losses.token_stats import TokenStats, token_stats
from opd_megatron.losses.vocab_topk import vocab_topk


@dataclass(frozen=True)
class LocalLogits:
    """Rows of a teacher's logits on this rank, before any temperature.

    local_logits_TV: [T, V / tp], sharded and padded as the student's; in the student's ids
        (`swap_columns`). vocab_size: real ids. group: tensor-parallel, None for whole rows.
    temperature: of the statistics.
    """

    local_logits_TV: torch.Tensor
    vocab_size: int
    group: dist.ProcessGroup | None = None
    backend: Backend = "auto"
    temperature: float = 1.0

    def stats(self, ids_T: torch.Tensor, support_ids_TJ: torch.Tensor | None = None) -> TokenStats:
        """log Z, entropy and the log-probs at the given ids, float32."""
        with torch.no_grad():
            return token_stats(
                self.local_logits_TV,
                ids_T,
                support_ids_TJ=support_ids_TJ,
                vocab_size=self.vocab_size,
                temperature=self.temperature,
                group=self.group,
                allow_nan=True,
                backend=self.backend,
            )

    def log_z(self) -> torch.Tensor:
        """[T] float32, over the whole vocabulary."""
        anything_T = self.local_logits_TV.new_zeros(len(self.local_logits_TV), dtype=torch.int64)
        return self.stats(anything_T).log_z_T

    def topk(self, k: int) -> torch.Tensor:
        """[T, min(k, vocabulary)] ids of its likeliest tokens, best first."""
        return vocab_topk(
            self.local_logits_TV,
            min(k, self.vocab_size),
            vocab_size=self.vocab_size,
            group=self.group,
        )


@torch.no_grad()
def swap_columns(
    local_logits_TV: torch.Tensor,
    swaps: Mapping[int, int],
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Let pairs of ids change places, in place and across shards: one all-reduce of [T, ids].

    Args:
        local_logits_TV: [T, V / tp].
        swaps: id -> partner, both ways; see `teacher/aliases.py`. Empty: nothing is sent.
    """
    if not swaps:
        return
    shape = local_logits_TV.shape
    shard = make_shard("local_logits_TV", shape, shape[1], vocab_size, group)
    ids = torch.tensor(sorted(swaps), device=local_logits_TV.device)
    partners = torch.tensor([swaps[i] for i in sorted(swaps)], device=local_logits_TV.device)
    columns, owned = shard.local_ids(partners), shard.local_ids(partners) >= 0
    # Zero on the ranks that do not hold the partner: the sum over ranks is its logit, bit for bit.
    arriving_TJ = local_logits_TV.new_zeros(shape[0], len(ids))
    arriving_TJ[:, owned] = local_logits_TV[:, columns[owned]]
    if shard.group is not None:
        dist.all_reduce(arriving_TJ, group=shard.group)  # pyright: ignore[reportUnknownMemberType]
    columns, owned = shard.local_ids(ids), shard.local_ids(ids) >= 0
    local_logits_TV[:, columns[owned]] = arriving_TJ[:, owned]


def support_of_logits(
    name: str,
    teacher: LocalLogits,
    *,
    topk: int,
    sampled_ids_T: torch.Tensor,
    student_ids_TK: torch.Tensor | None = None,
) -> tuple[Support, SupportInputs, torch.Tensor]:
    """The support of that name, the teacher at its ids, and the teacher's own top-K.

    Args:
        name: any support but `full`, which needs no list of ids (`fused.dense`).
        topk: K of the teacher.
        sampled_ids_T: [T].
        student_ids_TK: [T, K], for the supports that need the student's choice.

    Returns:
        The support, the teacher's log-probs at its ids, and [T, K] ids of its top-K.

    Raises:
        ConfigError: unknown name.
        LossInputError: an input is missing, or has the wrong dtype, shape or ids.
    """
    teacher_ids_TK = teacher.topk(topk)
    support = make_support(
        name,
        SupportSources(
            vocab_size=teacher.vocab_size,
            teacher_ids_TK=teacher_ids_TK,
            student_ids_TK=student_ids_TK,
            sampled_ids_T=sampled_ids_T,
        ),
    )
    logprobs_TJ = teacher.stats(sampled_ids_T, support.ids_TJ).support_logprobs_TJ
    assert logprobs_TJ is not None
    return support, SupportInputs(logprobs_TJ, support.valid_TJ), teacher_ids_TK
