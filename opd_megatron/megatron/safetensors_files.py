"""Safetensors of a model directory: reading slices of tensors, writing files tensor by tensor.

Reading touches only the bytes of the slice. Writing needs every shape first (the header comes
before the content), then one tensor at a time, so that no rank ever holds a whole model. A model
larger than `MAX_FILE_BYTES` becomes several files and an index, as `transformers` writes them:

    model.safetensors      or      model-00001-of-00003.safetensors ... model.safetensors.index.json
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from opd_megatron.errors import ConfigError
from opd_megatron.exchange.array_file import head_of_file
from opd_megatron.megatron.architecture import Architecture
from opd_megatron.megatron.hf_names import HEAD, IGNORED_SUFFIX, hf_shapes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The default of `transformers`; a tensor that is larger has a file of its own.
MAX_FILE_BYTES = 5_000_000_000

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _unreadable(model_path: Path, name: str, error: Exception) -> ConfigError:
    return ConfigError.of(
        "model path", str(model_path), f"{name} can not be read ({error!r})", "repair it"
    )


class ModelWeights:
    """The tensors of a Hugging Face directory, one file or sharded with an index.

    Args:
        model_path: the directory.

    Raises:
        ConfigError: no safetensors there, or the index or a shard is missing or damaged.
    """

    def __init__(self, model_path: Path) -> None:
        self.path = model_path
        index = model_path / INDEX_FILE
        files = [WEIGHTS_FILE]
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _unreadable(model_path, INDEX_FILE, error) from error
        self._files: dict[str, Any] = {}
        for name in files:
            try:
                opened = safe_open(model_path / name, framework="pt")
            except (
                Exception
            ) as error:  # safetensors raises its own type, OSError or a Rust panic type
                raise _unreadable(model_path, name, error) from error
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


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return dtype.itemsize * int(torch.Size(shape).numel())


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_file_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> the tensors in it, in the given order; one file where all of them fit."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_file_bytes
    for name, shape in shapes.items():
        size = _num_bytes(shape, dtype)
        if files[-1] and size > room:
            files.append({})
            room = max_file_bytes
        files[-1][name] = shape
        room -= size
    if len(files) == 1:
        return {WEIGHTS_FILE: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": members
        for number, members in enumerate(files, start=1)
    }


def write_model_files(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> int:
    """Write the weights of a model directory while the tensors arrive.

    Args:
        directory: exists and holds no weights.
        shapes, dtype, tensors, metadata: as for `write_safetensors`; metadata goes into every file.
        max_file_bytes: of the tensors in one file.

    Returns:
        Bytes of all weight files.
    """
    files = plan_files(shapes, dtype, max_file_bytes)
    arriving = iter(tensors)
    written = 0
    for file, members in files.items():
        of_file = itertools.islice(arriving, len(members))
        written += write_safetensors(directory / file, members, dtype, of_file, metadata)
    assert next(arriving, None) is None, "more tensors than shapes"
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(_num_bytes(shape, dtype) for shape in shapes.values())},
            "weight_map": {name: file for file, members in files.items() for name in members},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return written


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
    sizes = {name: _num_bytes(shape, dtype) for name, shape in shapes.items()}
    described = ((name, _DTYPE_NAMES[dtype], shape, sizes[name]) for name, shape in shapes.items())
    head = head_of_file(described, metadata)
    with path.open("wb") as file:
        file.write(head)
        for (name, shape), (given_name, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (name, shape, dtype) == (given_name, tuple(tensor.shape), tensor.dtype)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return len(head) + sum(sizes.values())
