"""Weights in and out: Hugging Face safetensors <-> this rank's Megatron shard, tensor by tensor.

`load` reads from disk only the slices that belong to the rank. `stream` yields complete Hugging
Face tensors on global rank 0: the owning pipeline stage gathers a unit over its tensor-parallel
group and sends it to rank 0 of the pipeline group. Only data-parallel replica 0 takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from opd_megatron.errors import ConfigError
from opd_megatron.megatron.architecture import Architecture
from opd_megatron.megatron.hf_names import (
    EMBEDDING,
    HEAD,
    Unit,
    tied_head_unit,
    units,
)
from opd_megatron.megatron.parallel import Groups
from opd_megatron.megatron.safetensors_files import ModelWeights, check_tensors

LocalParameters = list[tuple[Unit, torch.nn.Parameter]]


def _chunk_parameters(model: GPTModel, arch: Architecture) -> LocalParameters:
    """Units of one model chunk with their parameters, in export order."""
    parameters = dict(model.named_parameters())
    layers = {int(layer.layer_number) - 1: i for i, layer in enumerate(model.decoder.layers)}  # type: ignore[arg-type]
    found = []
    for unit in [*units(arch), tied_head_unit(arch)]:
        if unit.layer is not None and unit.layer not in layers:
            continue
        prefix = "" if unit.layer is None else f"decoder.layers.{layers[unit.layer]}."
        names = [prefix + name for name in unit.megatron if prefix + name in parameters]
        if names:
            found.append((unit, parameters.pop(names[0])))
    assert not parameters, f"parameters without an entry in the name table: {sorted(parameters)}"
    return found


def local_parameters(modules: Sequence[GPTModel], arch: Architecture) -> LocalParameters:
    """Units of this stage (one module, or the chunks of a virtual pipeline) with their parameters."""
    return [pair for module in modules for pair in _chunk_parameters(module, arch)]


def mark_sharded(modules: Sequence[GPTModel], arch: Architecture) -> None:
    """Set the attributes by which Megatron tells tensor-parallel shards from replicas.

    Megatron sets them while it initialises weights, which is skipped here. Without them the
    gradient norm counts the shards of rank 0 only, and clipping is wrong without any error.
    """
    for unit, parameter in local_parameters(modules, arch):
        if unit.kind == "whole":
            continue
        for name, value in (
            ("tensor_model_parallel", True),
            ("partition_dim", 1 if unit.kind == "columns" else 0),
            ("partition_stride", 2 if unit.kind == "rows" else 1),
        ):
            setattr(parameter, name, value)


def _split(size: int, parts: int, part: int) -> tuple[int, int]:
    return size // parts * part, size // parts * (part + 1)


def _interleave_heads(
    arch: Architecture, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Rows of whole key/value groups -> Megatron's [group][q..., k, v][head size] order."""
    groups = k.shape[0] // arch.head_size
    parts = [x.unflatten(0, (groups, -1, arch.head_size)) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def read_shard(
    weights: ModelWeights, unit: Unit, arch: Architecture, tp_size: int, tp_rank: int
) -> torch.Tensor:
    """This tensor-parallel rank's part of a unit, read from disk."""
    first, rows = unit.hf[0], unit.shapes[0][0]
    if unit.kind == "whole":
        return weights.rows(first, 0, rows)
    if unit.kind == "columns":
        return weights.columns(first, *_split(unit.shapes[0][1], tp_size, tp_rank))
    if unit.kind == "vocab":
        start, stop = _split(arch.padded_vocab_size, tp_size, tp_rank)
        real = weights.rows(first, min(start, rows), min(stop, rows))
        return torch.cat([real, real.new_zeros(stop - start - len(real), real.shape[1])])
    parts = [
        weights.rows(name, *_split(shape[0], tp_size, tp_rank))
        for name, shape in zip(unit.hf, unit.shapes, strict=True)
    ]
    return _interleave_heads(arch, *parts) if unit.kind == "heads" else torch.cat(parts)


def join_shards(unit: Unit, arch: Architecture, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """The Hugging Face tensors of a unit from the shards of all tensor-parallel ranks."""
    if unit.kind == "whole":
        return [shards[0]]
    if unit.kind == "columns":
        return [torch.cat(shards, dim=1)]
    if unit.kind == "vocab":
        return [torch.cat(shards)[: arch.vocab_size]]
    if unit.kind == "rows":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]
    per_group = arch.num_heads // arch.num_kv_heads
    joined = torch.cat(shards).unflatten(0, (arch.num_kv_heads, per_group + 2, arch.head_size))
    return [x.flatten(0, 2) for x in joined.split([per_group, 1, 1], dim=1)]


def _check_tied_head(weights: ModelWeights, arch: Architecture, tp_size: int, tp_rank: int) -> None:
    if not arch.tied_embeddings or HEAD not in weights.names():
        return
    rows = [min(row, arch.vocab_size) for row in _split(arch.padded_vocab_size, tp_size, tp_rank)]
    if not torch.equal(weights.rows(HEAD, *rows), weights.rows(EMBEDDING, *rows)):
        raise ConfigError.of(
            f"{weights.path}: tensor",
            HEAD,
            f"differs from {EMBEDDING}, but config.json says tie_word_embeddings",
            "set tie_word_embeddings to false or drop the tensor",
        )


@torch.no_grad()
def load(
    modules: Sequence[GPTModel], arch: Architecture, model_path: Path, tp: dist.ProcessGroup
) -> None:
    """Fill this rank's parameters from a Hugging Face directory.

    Raises:
        ConfigError: files and config.json disagree; the tensor is named.
    """
    weights = ModelWeights(model_path)
    check_tensors(weights, arch)
    _check_tied_head(weights, arch, tp.size(), tp.rank())
    for unit, parameter in local_parameters(modules, arch):
        shard = read_shard(weights, unit, arch, tp.size(), tp.rank())
        assert shard.shape == parameter.shape, (unit.hf, shard.shape, parameter.shape)
        parameter.copy_(shard)


def _gather_unit(
    unit: Unit, arch: Architecture, shard: torch.Tensor, tp: dist.ProcessGroup
) -> list[torch.Tensor] | None:
    """Hugging Face tensors of a unit on tensor-parallel rank 0, None elsewhere."""
    if unit.kind == "whole" or tp.size() == 1:
        return join_shards(unit, arch, [shard]) if tp.rank() == 0 else None
    shards = [torch.empty_like(shard) for _ in range(tp.size())] if tp.rank() == 0 else None
    dist.gather(shard.contiguous(), shards, dst=dist.get_global_rank(tp, 0), group=tp)
    return None if shards is None else join_shards(unit, arch, shards)


@torch.no_grad()
def stream(
    modules: Sequence[GPTModel],
    arch: Architecture,
    groups: Groups,
    value: str = "weight",
    *,
    to_cpu: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the whole model on global rank 0, in the order of `hf_shapes`.

    Collective over data-parallel replica 0: its other ranks must exhaust the iterator too, which
    yields nothing there. Ranks of other replicas return at once. A yielded tensor may alias the
    live weights: use it before the next one is asked for, or copy it.

    Args:
        value: "weight", or "gradient" for the reduced gradients (not with the distributed
            optimizer, which keeps a shard of them).
        to_cpu: bring every tensor to the CPU first.
    """
    if groups.dp_cp.rank() != 0:
        return
    local = dict(local_parameters(modules, arch))
    owned: list[list[tuple[str, ...]]] = [[] for _ in range(groups.pp.size())]
    dist.all_gather_object(owned, [unit.hf for unit in local], group=groups.pp)
    for unit in units(arch):
        owner = next(stage for stage, names in enumerate(owned) if unit.hf in names)
        tensors: list[torch.Tensor] | None = None
        dtype = torch.float32 if value == "gradient" else modules[0].config.params_dtype
        if groups.pp.rank() == owner:
            source = "main_grad" if value == "gradient" else "data"
            tensors = _gather_unit(unit, arch, getattr(local[unit], source), groups.tp)
        if groups.tp.rank() != 0:
            continue
        root = dist.get_global_rank(groups.pp, 0)
        device = next(modules[0].parameters()).device
        if owner != 0 and groups.pp.rank() == owner and tensors is not None:
            for tensor in tensors:
                dist.send(tensor.contiguous(), dst=root, group=groups.pp)
        if groups.pp.rank() != 0:
            continue
        if owner != 0:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in unit.shapes]
            for tensor in tensors:
                dist.recv(tensor, src=dist.get_global_rank(groups.pp, owner), group=groups.pp)
        assert tensors is not None
        for name, tensor in zip(unit.hf, tensors, strict=True):
            yield name, tensor.detach().cpu() if to_cpu else tensor.detach()
