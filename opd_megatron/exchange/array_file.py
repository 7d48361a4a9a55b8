"""Numpy arrays to one safetensors file without a copy of them in memory, atomically.

`safetensors.numpy` makes the file in memory first, or writes it with errors of its own type, of which nobody can tell
that a disk is full. A top-K of millions of tokens is gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_megatron.atomic import replacing

_DTYPE_NAMES = {"float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8"}


def head_of_file(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """What a safetensors file begins with; the content of its tensors follows in the same order.

    Args:
        tensors: name, dtype as the format calls it, shape and bytes of each.
        metadata: the header's string map.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, size in tensors:
        offsets = [offset, offset + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_arrays(
    path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write arrays of float32, int32, int64 and uint8 under their names; a reader sees all of them or none.

    Raises:
        OSError: as any write.
    """
    # The widest first, so that every array begins at a multiple of its item.
    ordered = sorted(arrays.items(), key=lambda named: -named[1].itemsize)
    described = [(n, _DTYPE_NAMES[a.dtype.name], a.shape, a.nbytes) for n, a in ordered]
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(head_of_file(described, metadata))
        for _, array in ordered:
            little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little_endian).data)
