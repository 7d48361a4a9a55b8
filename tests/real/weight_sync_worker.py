"""One rank of a learner that serves one mailbox after the other: WORK/tp2, then WORK/pp2.

torchrun --nproc-per-node 2 weight_sync_worker.py WORK MODEL
"""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config.schema import LearnerConfig, Recipe, StudentConfig
from opd_megatron.lifeline import die_with_parent
from opd_megatron.megatron import cpu_shim, parallel
from opd_megatron.megatron.layout import layout_of
from opd_megatron.megatron.learner import CommandLoop, _announce, serve
from opd_megatron.megatron.state import build_state

TIMEOUT_S = 300.0
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
}


def main() -> None:
    die_with_parent(os.getppid())
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu_shim.install()
    work, model = Path(sys.argv[1]), Path(sys.argv[2])
    parallel.start_process_group("cpu", TIMEOUT_S)
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    assert isinstance(group, dist.ProcessGroup)
    for name, layout in LAYOUTS.items():
        learner = LearnerConfig(precision="fp32", step_timeout_s=TIMEOUT_S, **layout)
        recipe = Recipe(device="cpu", student=StudentConfig(path=str(model)), learner=learner)
        parallel.start_model_parallel(layout_of(learner), recipe.seed, TIMEOUT_S)
        state = build_state(recipe)
        loop = CommandLoop(work / name, group)
        _announce(state, loop.folder)
        serve(state, loop)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
