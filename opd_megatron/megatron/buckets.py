"""Tensors of a model in buckets: one flat array of bytes each, filled from a stream.

The buckets follow from the model's shapes alone, so whoever receives them can be told beforehand.
All are filled in one buffer, as large as the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BucketPlan:
    """Tensors that travel together; `num_bytes` of them, laid one after the other."""

    tensors: tuple[tuple[str, Shape], ...]
    num_bytes: int


def plan_buckets(
    shapes: Mapping[str, Shape], dtype: torch.dtype, limit_bytes: int
) -> list[BucketPlan]:
    """Fill buckets in order, none above `limit_bytes` unless one tensor alone is."""
    buckets: list[BucketPlan] = []
    tensors: list[tuple[str, Shape]] = []
    size = 0
    for name, shape in shapes.items():
        added = math.prod(shape) * dtype.itemsize
        if tensors and size + added > limit_bytes:
            buckets.append(BucketPlan(tuple(tensors), size))
            tensors, size = [], 0
        tensors.append((name, shape))
        size += added
    return [*buckets, BucketPlan(tuple(tensors), size)] if tensors else buckets


def filled_buckets(
    buckets: Sequence[BucketPlan],
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Yield each bucket as uint8 [num_bytes]; all share one buffer, so use it before the next."""
    buffer = torch.empty(
        max(bucket.num_bytes for bucket in buckets), dtype=torch.uint8, device=device
    )
    for bucket in buckets:
        offset = 0
        for name, shape in bucket.tensors:
            given, tensor = next(tensors)
            # What the servers were told must be what they get: bytes carry no name.
            assert (given, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype), (given, name)
            end = offset + math.prod(shape) * dtype.itemsize
            buffer[offset:end].view(dtype).view(shape).copy_(tensor)
            offset = end
        yield buffer[:offset]
