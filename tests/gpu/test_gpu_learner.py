"""The learner on one GPU, where Megatron-Core and Transformer Engine are installed there.

What is measured is written to benchmarks/results/learner-gpu.json, or to the path in OPD_GPU_RESULTS.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

WORKER = Path(__file__).with_name("gpu_learner_worker.py")
REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "learner-gpu.json"
NEEDED = ("megatron", "transformer_engine", "safetensors", "omegaconf")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    if not torch.cuda.is_available():
        pytest.skip("LEARNER NOT RUN: no CUDA device")
    if MISSING:
        pytest.skip(f"LEARNER NOT RUN: this Python lacks {', '.join(MISSING)} (locks/README.md)")
    out = Path(os.environ.get("OPD_GPU_RESULTS", RESULTS))
    run = subprocess.run(
        [sys.executable, str(WORKER), str(out), "cuda"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


def test_transformer_engines_layers_are_as_near_to_fp32_as_plain_ones(seen: dict[str, Any]) -> None:
    plain, engine = seen["plain_bf16_to_fp32"], seen["engine_bf16_to_fp32"]
    for name in ("logprob_mean", "gradient"):
        assert 0 < engine[name] < 2 * plain[name], name


def test_fp8_recipes_of_this_chip_stay_near_bf16(seen: dict[str, Any]) -> None:
    if not seen["fp8_to_bf16"]:
        pytest.skip(f"NO FP8 RUN: {seen['device']} supports no recipe")
    for recipe, drift in seen["fp8_to_bf16"].items():
        assert 0 < drift["logprob_mean"] < 0.1, recipe
        assert drift["gradient"] < 0.5, recipe


def test_a_step_runs_in_every_precision_and_reports_speed_and_memory(seen: dict[str, Any]) -> None:
    assert set(seen["step"]) == {"bf16", *seen["fp8_to_bf16"]}
    for step in seen["step"].values():
        assert step["tokens_per_s"] > 0 and step["peak_gib"] > 0
