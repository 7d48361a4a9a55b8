"""Builds stages of published models without weights and compares every parameter with what would be loaded into it.

    python megatron_shapes_worker.py WORK_DIRECTORY

One process plays a rank of a large world on torch's fake process group: groups exist, nothing is sent. Parameters are
allocated and never written, so they take no memory. WORK/shapes.json: per case, problems and units.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.megatron import cpu_shim, hf, parallel
from opd_megatron.megatron.architecture import Architecture, architecture_of
from opd_megatron.megatron.hf_names import hf_shapes, units
from opd_megatron.megatron.known_models import PUBLISHED
from opd_megatron.megatron.model import build_stage, transformer_config
from opd_megatron.megatron.safetensors_files import ModelWeights

# Model -> layout; the first and the last rank of each are built.
CASES: dict[str, dict[str, int]] = {
    "Qwen3-0.6B": {"tensor_parallel": 8},
    "Qwen3-4B": {"tensor_parallel": 4, "pipeline_parallel": 2},
    "Qwen3-8B": {"tensor_parallel": 8, "pipeline_parallel": 2, "virtual_pipeline": 3},
    "Qwen3-32B": {"tensor_parallel": 8, "pipeline_parallel": 8},
    "Qwen2.5-7B": {"tensor_parallel": 4, "pipeline_parallel": 4},
    "Qwen2.5-32B": {"tensor_parallel": 8, "pipeline_parallel": 4},
    "Llama-3.1-8B": {"tensor_parallel": 8, "pipeline_parallel": 4},
    "Llama-3.2-1B": {"tensor_parallel": 8, "pipeline_parallel": 2},
}


class EmptyWeights(ModelWeights):
    """Tensors of the right shapes without content."""

    def __init__(self, arch: Architecture) -> None:
        self._shapes = hf_shapes(arch)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.empty(self._shapes[name], device="meta")[start:stop]

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.empty(self._shapes[name], device="meta")[:, start:stop]


def build(arch: Architecture, learner: LearnerConfig, rank: int) -> dict[str, Any]:
    """One rank's stage: units in it, and parameters whose shape is not that of the loaded shard."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=learner.world_size)
    vpp = learner.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=learner.tensor_parallel,
        pipeline_model_parallel_size=learner.pipeline_parallel,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        create_gloo_process_groups=False,  # torch's fake groups stand in for NCCL only
    )
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    modules = build_stage(arch, transformer_config(arch, learner, "cpu"), learner, "cpu")
    weights, tp = EmptyWeights(arch), parallel.current_groups().tp
    problems: list[str] = []
    found: list[str] = []
    for unit, parameter in hf.local_parameters(modules, arch):
        shard = hf.read_shard(weights, unit, arch, tp.size(), tp.rank())
        found.append(unit.hf[0])
        if shard.shape != parameter.shape:
            problems.append(f"{unit.hf}: {list(shard.shape)} into {list(parameter.shape)}")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return {"problems": problems, "units": found}


def main() -> None:
    torch.set_num_threads(1)
    cpu_shim.install()
    results = {}
    for name, layout in CASES.items():
        arch = architecture_of(PUBLISHED[name][0], name)
        learner = LearnerConfig(precision="bf16", **layout)  # pyright: ignore[reportArgumentType]
        # One rank of every pipeline stage: Megatron's order has tensor parallel ranks first.
        stages = [
            build(arch, learner, learner.tensor_parallel * stage + stage % learner.tensor_parallel)
            for stage in range(learner.pipeline_parallel)
        ]
        held = {unit for stage in stages for unit in stage["units"]}
        results[name] = {
            "problems": [problem for stage in stages for problem in stage["problems"]],
            "missing": [unit.hf[0] for unit in units(arch) if unit.hf[0] not in held],
        }
    (Path(sys.argv[1]) / "shapes.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
