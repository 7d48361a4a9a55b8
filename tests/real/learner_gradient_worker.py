"""One rank: a step of the Megatron learner on a batch file, its gradient written in HF layout.

    python learner_gradient_worker.py STUDENT BATCH OUT TP DP      (RANK, WORLD_SIZE, MASTER_* in
    the environment)

The learner's own `train` runs with clipping off; then every parameter is overwritten with its
reduced gradient and `publish` writes them under their Hugging Face names. Rank 0 also writes the
metrics and the per-token values.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from opd_megatron.config.schema import (
    BatchConfig,
    LearnerConfig,
    OptimizerConfig,
    Recipe,
    StudentConfig,
)
from opd_megatron.exchange.batch_file import read_batch, read_index, read_whole
from opd_megatron.megatron.learner import start_world
from opd_megatron.megatron.publish import publish
from opd_megatron.megatron.step import train


def main() -> None:
    student, batch, out = (Path(a) for a in sys.argv[1:4])
    tp, dp = (int(a) for a in sys.argv[4:6])
    recipe = Recipe(
        device="cpu",
        student=StudentConfig(path=str(student)),
        optimizer=OptimizerConfig(lr=0.0, clip_grad=0.0),
        batch=BatchConfig(tokens_per_microbatch=96),
        learner=LearnerConfig(
            tensor_parallel=tp, data_parallel=dp, precision="fp32", step_timeout_s=60.0
        ),
    )
    state = start_world(replace(recipe, name="gradient"))
    state.load_hf(student)
    read = functools.partial(read_batch, batch)
    result = train(state, read_index(batch), read, read_whole(batch))
    with torch.no_grad():
        for parameter in state.modules[0].parameters():
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    publish(state.modules, state.arch, state.groups, student, out / "gradient", 0)
    if dist.get_rank() == 0:
        (out / "metrics.json").write_text(json.dumps(result.metrics))
        save_file(result.values, out / "values.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
