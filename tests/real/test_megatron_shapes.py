"""Published students of 0.6B-32B, without their weights: names and shapes as in `transformers` and in Megatron."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.megatron.architecture import architecture_of
from opd_megatron.megatron.hf_names import HEAD, hf_shapes
from opd_megatron.megatron.known_models import PUBLISHED

pytestmark = pytest.mark.real

WORKER = Path(__file__).with_name("megatron_shapes_worker.py")
REPOSITORY = Path(__file__).parents[2]
BUILT = [
    *("Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B", "Qwen3-32B", "Qwen2.5-7B", "Qwen2.5-32B"),
    *("Llama-3.1-8B", "Llama-3.2-1B"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(PUBLISHED[name][0])
    theirs = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        shapes.pop(HEAD)
    assert hf_shapes(architecture_of(PUBLISHED[name][0], name)) == shapes


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("shapes")
    run = subprocess.run(
        [sys.executable, str(WORKER), str(work)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((work / "shapes.json").read_text())


@pytest.mark.parametrize("name", BUILT)
def test_every_parameter_of_a_large_layout_takes_the_shard_that_is_read_for_it(
    built: dict[str, Any], name: str
) -> None:
    assert built[name] == {"problems": [], "missing": []}
