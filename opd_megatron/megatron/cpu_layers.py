"""RMSNorm and core attention for CPU, where Transformer Engine does not exist.

Megatron-Core's own fallbacks refuse sequence parallel (norm), packed documents and context parallel
(attention). These do all three. Attention runs PyTorch's fused kernel on documents gathered into
padded [n, S] batches, one per power of two of the document length: padding stays after a document,
so the causal mask is the only one needed. Under context parallel every rank gathers all documents
and keeps its rows: a correctness path, not a fast one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.data.packing import context_parallel_rows


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, in float32, rounded as `transformers` does it."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallel each rank sees other tokens: Megatron must sum the gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.float()
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * hidden.to(x.dtype)


@dataclass(frozen=True)
class _Bucket:
    """Documents of similar length as one padded batch [documents, length]."""

    documents: int
    length: int
    rows: torch.Tensor  # packed row of each token of the bucket
    slots: torch.Tensor  # its place in the flattened padded batch


@functools.lru_cache(maxsize=16)
def _buckets(borders: tuple[int, ...]) -> tuple[tuple[_Bucket, ...], torch.Tensor]:
    """Buckets of a packing, and where each packed row is in the concatenated bucket outputs."""
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, end in itertools.pairwise(borders):
        groups[(end - start - 1).bit_length()].append((start, end))
    buckets = []
    for _, documents in sorted(groups.items()):
        length = max(end - start for start, end in documents)
        rows = torch.cat([torch.arange(start, end) for start, end in documents])
        slots = torch.cat([torch.arange(e - s) + d * length for d, (s, e) in enumerate(documents)])
        buckets.append(_Bucket(len(documents), length, rows, slots))
    order = torch.cat([b.rows for b in buckets])
    return tuple(buckets), torch.argsort(order)


@functools.lru_cache(maxsize=16)
def _context_parallel_maps(
    borders: tuple[int, ...], size: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed order -> row of the rank-major gather, packed rows of this rank)."""
    rows = [torch.from_numpy(context_parallel_rows(borders, size, r)) for r in range(size)]
    return torch.argsort(torch.cat(rows)), rows[rank]


class _GatherRows(torch.autograd.Function):
    """All-gather along dim 0; backward sums over ranks and keeps the own rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size(), 0)[ctx.group.rank()], None


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[n, S, heads, d] -> [n, S, heads, d]."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Causal attention inside each document.

    Args:
        q: [T, heads, d]. k, v: [T, kv heads, d].
        borders: document borders, from 0 to T.
        scale: factor of the scores.

    Returns:
        [T, heads, d].
    """
    buckets, inverse = _buckets(borders)
    outputs = []
    for bucket in buckets:

        def padded(x: torch.Tensor, bucket: _Bucket = bucket) -> torch.Tensor:
            picked = x.index_select(0, bucket.rows)
            flat = x.new_zeros((bucket.documents * bucket.length, *x.shape[1:]))
            flat = flat.index_copy(0, bucket.slots, picked)
            return flat.view(bucket.documents, bucket.length, *x.shape[1:])

        out = _causal(padded(q), padded(k), padded(v), scale)
        outputs.append(out.flatten(0, 1).index_select(0, bucket.slots))
    return torch.cat(outputs).index_select(0, inverse)


class CoreAttention(MegatronModule):
    """Causal grouped-query attention over packed documents (thd) or over a batch of rows ([S, B])."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        group = (
            parallel_state.get_context_parallel_group()
            if pg_collection is None
            else pg_collection.cp
        )
        assert isinstance(group, dist.ProcessGroup)
        self.cp_group = group

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d] packed -> [T, heads * d]; [S, B, heads, d] -> [S, B, heads * d]."""
        cp_size = self.cp_group.size()
        if packed_seq_params is not None:
            borders = tuple(packed_seq_params.cu_seqlens_q.tolist())
            return self._packed(query, key, value, borders)
        length, rows = query.shape[:2]
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if cp_size == 1:
            return _causal(q, k, v, self.scale).transpose(0, 1).flatten(2)
        # Rows are documents of one length.
        borders = tuple(range(0, (rows + 1) * length * cp_size, length * cp_size))
        out = self._packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), borders)
        return out.unflatten(0, (rows, length)).transpose(0, 1)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: tuple[int, ...]
    ) -> torch.Tensor:
        """This rank's part of documents with these borders: [T, heads, d] -> [T, heads * d]."""
        cp_size = self.cp_group.size()
        if cp_size == 1:
            return packed_attention(query, key, value, borders, self.scale).flatten(1)
        packed_order, own_rows = _context_parallel_maps(borders, cp_size, self.cp_group.rank())
        heads, kv_heads = query.shape[1], key.shape[1]
        gathered = _GatherRows.apply(torch.cat([query, key, value], dim=1), self.cp_group)
        q, k, v = gathered.index_select(0, packed_order).split([heads, kv_heads, kv_heads], dim=1)
        out = packed_attention(q, k, v, borders, self.scale)
        return out.index_select(0, own_rows).flatten(1)
