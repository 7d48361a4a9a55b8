"""Safetensors of a model directory: reading slices of tensors, writing a file tensor by tensor.

Reading touches only the bytes of the slice. Writing needs every shape first (the header comes
before the content), then one tensor at a time, so that no rank ever holds a whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from opd_megatron.errors import ConfigError
from opd_megatron.megatron.architecture import Architecture
from opd_megatron.megatron.hf_names import HEAD, IGNORED_SUFFIX, hf_shapes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class ModelWeights:
    """The tensors of a Hugging Face directory, one file or sharded with an index.

    Args:
        model_path: the directory.

    Raises:
        ConfigError: no safetensors there, or a shard is missing or damaged.
    """

    def __init__(self, model_path: Path) -> None:
        self.path = model_path
        index = model_path / INDEX_FILE
        files = [WEIGHTS_FILE]
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        self._files: dict[str, Any] = {}
        for name in files:
            try:
                opened = safe_open(model_path / name, framework="pt")
            except (
                Exception
            ) as error:  # safetensors raises its own type, OSError or a Rust panic type
                raise ConfigError.of(
                    "model path", str(model_path), f"{name} can not be read ({error})", "repair it"
                ) from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor; entries of a vector."""
        return self._files[name].get_slice(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns [start, stop) of a matrix."""
        return self._files[name].get_slice(name)[:, start:stop]


def check_tensors(weights: ModelWeights, arch: Architecture) -> None:
    """Compare what the files hold with what config.json asks for.

    Raises:
        ConfigError: a missing, additional or differently shaped tensor, by name.
    """
    wanted = hf_shapes(arch)
    present = {n for n in weights.names() if not n.endswith(IGNORED_SUFFIX)}
    if arch.tied_embeddings:
        present.discard(HEAD)  # compared with the embedding while loading
    problems = dict.fromkeys(set(wanted) - present, "config.json asks for it, the weights lack it")
    problems |= dict.fromkeys(present - set(wanted), "config.json has no place for it")
    for name, problem in sorted(problems.items()):
        raise ConfigError.of(f"{weights.path}: tensor", name, problem, "use matching files")
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise ConfigError.of(
                f"{weights.path}: tensor",
                name,
                f"shape {list(weights.shape(name))}, config.json asks for {list(shape)}",
                "use matching files",
            )


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> int:
    """Write one file while the tensors arrive.

    Args:
        path: the new file.
        shapes: of every tensor, in the order in which `tensors` yields them.
        dtype: of every tensor.
        tensors: name and CPU tensor.
        metadata: the header's string map.

    Returns:
        Bytes written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        size = dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for (name, shape), (given_name, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (name, shape, dtype) == (given_name, tuple(tensor.shape), tensor.dtype)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return 8 + len(head) + offset
