"""The student's top-K tokens from vocabulary-parallel logits: local top-K, gather, top-K again.

No gradient: a support is a set. One all-gather of [T, K] values and ids a rank. Ties are broken as
torch.topk breaks them, equally on every rank.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from opd_megatron.losses.checks import LOGIT_DTYPES, LossInputError, check_dtype, check_shape


@torch.no_grad()
def vocab_topk(
    local_logits_TV: torch.Tensor,
    k: int,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Ids of the K largest logits, best first.

    Args:
        local_logits_TV: [T, V / tp]; rank r holds the ids [r * v, (r + 1) * v).
        k: wanted entries; beyond the vocabulary they are -1.
        vocab_size: number of real ids; padded columns are never chosen.
        group: tensor-parallel group; None for unsharded logits.

    Returns:
        [T, k] int64, the same on every rank.

    Raises:
        LossInputError: wrong dtype or shape, or k < 1.
    """
    check_dtype("local_logits_TV", local_logits_TV, LOGIT_DTYPES)
    check_shape("local_logits_TV", local_logits_TV, ("T", "V/tp"))
    if k < 1:
        raise LossInputError(f"k: {k} seen, at least 1 wanted")
    num_tokens, local_size = local_logits_TV.shape
    world_size = 1 if group is None else dist.get_world_size(group)
    first_id = 0 if group is None else dist.get_rank(group) * local_size
    num_real = max(0, min(local_size, vocab_size - first_id))
    values_TK = local_logits_TV.new_full((num_tokens, k), -math.inf)
    ids_TK = torch.full((num_tokens, k), -1, dtype=torch.int64, device=local_logits_TV.device)
    width = min(k, num_real)
    if width > 0:
        best = local_logits_TV[:, :num_real].topk(width, dim=1)
        values_TK[:, :width] = best.values
        ids_TK[:, :width] = best.indices + first_id
    if world_size == 1:
        return ids_TK
    all_values = [torch.empty_like(values_TK) for _ in range(world_size)]
    all_ids = [torch.empty_like(ids_TK) for _ in range(world_size)]
    dist.all_gather(all_values, values_TK, group=group)  # pyright: ignore[reportUnknownMemberType]
    dist.all_gather(all_ids, ids_TK, group=group)  # pyright: ignore[reportUnknownMemberType]
    values, ids = torch.cat(all_values, dim=1), torch.cat(all_ids, dim=1)
    # A real token with logit -inf still beats a missing one, so that K = V finds the whole
    # vocabulary.
    values = torch.where(ids >= 0, values.clamp_min(torch.finfo(values.dtype).min), values)
    return ids.gather(1, values.topk(k, dim=1).indices)
