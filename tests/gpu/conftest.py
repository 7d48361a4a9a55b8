"""The device of these tests: one CUDA GPU, or the CPU where Triton interprets its kernels.

    make test-gpu                                     on one GPU
    TRITON_INTERPRET=1 python -m pytest tests/gpu     on a CPU; slow, small shapes, same claims

Needs pytest, torch and triton and no other part of the project's environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CUDA = torch.cuda.is_available()
torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    if not HAS_CUDA and not INTERPRETED:
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1")
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def cuda_device() -> torch.device:
    if not HAS_CUDA:
        pytest.skip("no CUDA device")
    return torch.device("cuda")
