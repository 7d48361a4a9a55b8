"""The Megatron student against `transformers` on the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

WORKER = Path(__file__).with_name("megatron_parity_worker.py")
REPOSITORY = Path(__file__).parents[2]
MODELS = ["qwen3", "qwen3_tied", "qwen2", "qwen2_tied", "llama"]
LAYOUTS = ["tp1", "tp2", "tp2_sp", "pp2", "pp2_interleaved", "cp2", "dp2_distributed_optimizer"]

Results = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Results:
    work = tmp_path_factory.mktemp("parity")
    launch = [sys.executable, "-m", "opd_megatron.megatron.torchrun", "--opd-fork"]
    run = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(WORKER), str(work), "parity"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((work / "parity.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_single_rank_logits_equal_transformers_exactly(differences: Results, model: str) -> None:
    assert differences[f"{model}-tp1"]["logits"] == 0.0


@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallel_logits_equal_transformers(differences: Results, model: str) -> None:
    assert differences[f"{model}-tp2"]["logits"] <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_packed_logits_of_every_layout_equal_transformers(
    differences: Results, model: str, layout: str
) -> None:
    assert differences[f"{model}-{layout}"]["packed_logits"] <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_packed_logprobs_and_entropies_equal_transformers(
    differences: Results, model: str, layout: str
) -> None:
    case = differences[f"{model}-{layout}"]
    assert case["logprobs"] <= 1e-5
    assert case["entropy"] <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_exported_weights_equal_the_files_exactly(
    differences: Results, model: str, layout: str
) -> None:
    assert differences[f"{model}-{layout}"]["tensors_that_differ"] == 0
