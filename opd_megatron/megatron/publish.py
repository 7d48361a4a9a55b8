"""A complete Hugging Face directory of the current weights, visible only when it is whole.

Written into a hidden sibling and renamed. Everything of the student's directory that is not weights
(config, tokenizer, chat template, generation config) is copied, so that `transformers` and SGLang
load the result alone. The files are not fsynced: a published version lives while its run does, and
a resumed run publishes again from its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from opd_megatron.atomic import write_json
from opd_megatron.exchange.beats import Mark, unwatched
from opd_megatron.lifeline import BEAT_S
from opd_megatron.megatron.architecture import CONFIG_FILE, Architecture
from opd_megatron.megatron.hf import stream
from opd_megatron.megatron.hf_names import hf_shapes
from opd_megatron.megatron.parallel import Groups
from opd_megatron.megatron.safetensors_files import INDEX_FILE, write_model_files

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_DTYPE_KEYS = ("dtype", "torch_dtype")


def _copy_other_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix in _WEIGHT_SUFFIXES or path.name == INDEX_FILE:
            continue
        if path.name == CONFIG_FILE:
            config = json.loads(path.read_text())
            for key in _DTYPE_KEYS:
                if key in config:
                    config[key] = str(dtype).removeprefix("torch.")
            write_json(target / CONFIG_FILE, config, durable=False)
        elif not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def _swap_in(temporary: Path, directory: Path) -> None:
    """Rename into place; a directory of an earlier attempt of the same version gives way."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(temporary, directory)
    shutil.rmtree(old, ignore_errors=True)


def _marked(
    tensors: Iterator[tuple[str, torch.Tensor]], mark: Mark
) -> Iterator[tuple[str, torch.Tensor]]:
    marked = -math.inf
    for name, tensor in tensors:
        # A model has hundreds of tensors; nobody looks more often.
        if time.monotonic() - marked >= BEAT_S:
            marked = time.monotonic()
            mark(f"publishing {name}")
        yield name, tensor


def publish(
    modules: Sequence[GPTModel],
    arch: Architecture,
    groups: Groups,
    student_path: Path,
    directory: Path,
    version: int,
    mark: Mark = unwatched,
) -> tuple[int, int]:
    """Write the current weights as a Hugging Face directory. Collective; rank 0 writes.

    Args:
        student_path: where config, tokenizer and templates come from.
        directory: the new directory; its parent exists.
        version: weight version, kept in the header of every weight file.
        mark: told of a tensor every second, on rank 0.

    Returns:
        (bytes of the weight files, tensors); (0, 0) on other ranks than 0.
    """
    tensors = _marked(stream(modules, arch, groups), mark)
    if dist.get_rank() != 0:
        for _ in tensors:
            raise AssertionError("only rank 0 receives tensors")
        return 0, 0
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shapes = hf_shapes(arch)
    dtype = modules[0].config.params_dtype
    size = write_model_files(
        temporary,
        shapes,
        dtype,
        tensors,
        {"format": "pt", "weight_version": str(version)},
    )
    _copy_other_files(student_path, temporary, dtype)
    _swap_in(temporary, directory)
    return size, len(shapes)
