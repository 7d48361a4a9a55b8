"""Runs under torchrun: what loading and exporting a model of 450 MB takes of each rank's memory.

    torchrun --nproc-per-node 2 megatron_memory_worker.py WORK_DIRECTORY memory

Counted is anonymous resident memory, which holds every tensor of the process but no page of a mapped file. Parameters
are not written before they are loaded, so loading grows by the rank's shard and whatever else it takes meanwhile.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_cases import Case
from megatron_setup import new_state, recipe_for, run_worker
from megatron_tiny import model_config, write_config

from opd_megatron.megatron import hf
from opd_megatron.megatron.architecture import Architecture, architecture_of
from opd_megatron.megatron.hf_names import hf_shapes, units
from opd_megatron.megatron.safetensors_files import ModelWeights, write_model_files

MAX_FILE_BYTES = 100_000_000
LARGE: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8000,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
}


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def growth(work: Callable[[], object]) -> int:
    """The most anonymous memory that `work` takes over what there was before, sampled every millisecond."""
    gc.collect()
    before = most = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    most = max(most, _anonymous_bytes())
    done.set()
    watcher.join()
    return most - before


def write_large(directory: Path) -> Architecture:
    """A model of several files with random weights, tensor by tensor."""
    config = model_config("qwen3", tied=False, **LARGE)
    arch = architecture_of(config)
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in hf_shapes(arch).items():
            yield name, torch.randn(shape, generator=generator)

    directory.mkdir()
    write_config(directory, config)
    metadata = {"format": "pt"}
    write_model_files(
        directory, hf_shapes(arch), torch.float32, tensors(), metadata, MAX_FILE_BYTES
    )
    return arch


def case(model: Path, out: Path, arch: Architecture, learner: dict[str, Any]) -> dict[str, Any]:
    """Load and export in one layout; bytes by rank, and what differs in the export."""
    state = new_state(recipe_for(model, Case(learner)))
    shard = sum(p.nbytes for module in state.modules for p in module.parameters())

    def load() -> None:
        hf.load(state.modules, arch, model, state.groups.tp)

    def export() -> None:
        streamed = hf.stream(state.modules, arch, state.groups)
        if dist.get_rank() == 0:
            shapes = hf_shapes(arch)
            write_model_files(out, shapes, torch.float32, streamed, {}, MAX_FILE_BYTES)
        else:
            assert not list(streamed)

    if dist.get_rank() == 0:
        out.mkdir()
    dist.barrier()
    mine = {"shard": shard, "load": growth(load), "export": growth(export)}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    differ: list[str] = []
    if dist.get_rank() == 0:
        first, second = ModelWeights(model), ModelWeights(out)
        for name, shape in hf_shapes(arch).items():
            if not torch.equal(first.rows(name, 0, shape[0]), second.rows(name, 0, shape[0])):
                differ.append(name)
    files = sorted(p.name for p in out.iterdir())
    return {"ranks": ranks, "differ": differ, "files": files}


def memory(work: Path) -> dict[str, Any]:
    model = work / "large"
    if dist.get_rank() == 0:
        write_large(model)
    dist.barrier()
    arch = architecture_of(model_config("qwen3", tied=False, **LARGE))
    sizes = [sum(4 * int(torch.Size(s).numel()) for s in unit.shapes) for unit in units(arch)]
    cases = {name: case(model, work / name, arch, learner) for name, learner in LAYOUTS.items()}
    return {"model": sum(sizes), "unit": max(sizes), **cases}


if __name__ == "__main__":
    run_worker({"memory": memory})
