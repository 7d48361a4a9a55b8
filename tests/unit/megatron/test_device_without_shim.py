"""The stand-ins for CUDA are for device=cpu alone: a rank that is to use a GPU never loads them, not even to fail."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.megatron.learner import start_world
try:
    start_world(Recipe(device="cuda"))
except ConfigError as error:
    print(error)
import torch
print("shim" if "opd_megatron.megatron.cpu_shim" in sys.modules else "no shim")
print(torch.cuda.current_device.__module__)
"""


def test_a_rank_for_a_gpu_is_refused_without_one_and_never_loads_the_cpu_shim() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    reason, shim, owner = run.stdout.splitlines()[-3:]
    assert reason.startswith("device='cuda': torch sees no CUDA device in this process")
    assert (shim, owner) == ("no shim", "torch.cuda")
