"""The builder's CUDA side without a GPU: layers, FP8 recipes, and every weight's name and shape.

Runs where Transformer Engine's Python part is installed apart (`make test-megatron-latest` does it and names the place
in OPD_TRANSFORMER_ENGINE_SITE). Not covered: any kernel; nothing is computed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SITE = os.environ.get("OPD_TRANSFORMER_ENGINE_SITE", "")
pytestmark = [pytest.mark.real, pytest.mark.transformer_engine]

WORKER = Path(__file__).with_name("megatron_te_worker.py")
REPOSITORY = Path(__file__).parents[2]
MODELS = ["qwen3", "qwen3_tied", "qwen2_tied", "llama"]
RECIPES = {
    "bf16": ("NoneType", None),
    "delayed": ("TEDelayedScaling", "HYBRID"),
    "current": ("Float8CurrentScaling", "HYBRID"),
    "blockwise": ("Float8BlockScaling", "E4M3"),
    "mxfp8": ("MXFP8BlockScaling", "E4M3"),
}
LAYERS = 4


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    work = tmp_path_factory.mktemp("te")
    run = subprocess.run(
        [sys.executable, str(WORKER), str(work), SITE],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((work / "te.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_hugging_face_weights_go_through_transformer_engines_layers_unchanged(
    built: dict[str, dict[str, Any]], model: str, recipe: str
) -> None:
    case = built[f"{model}-{recipe}"]
    assert (case["differ"], case["left_over"]) == ([], [])
    assert case["fused_norms"] == 2 * LAYERS, "one in front of q/k/v, one in front of gate and up"
    assert case["sharded"]


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_a_tensor_parallel_rank_takes_the_shard_that_is_read_for_it(
    built: dict[str, dict[str, Any]], model: str
) -> None:
    assert built[f"{model}-two-ranks"] == {"differ": [], "missing": []}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_the_builder_makes_transformer_engines_layers_and_recipe(
    built: dict[str, dict[str, Any]], model: str, recipe: str
) -> None:
    case = built[f"{model}-{recipe}"]
    fused = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    assert fused <= set(case["layers"])
    assert (case["recipe"], case["format"]) == RECIPES[recipe]
    # The head is Megatron's own layer, which has no FP8.
    assert "ColumnParallelLinear" in case["layers"]


def test_the_two_devices_differ_in_fusions_and_sends_only(built: dict[str, dict[str, Any]]) -> None:
    assert built["devices"]["differ"] == [
        "apply_rope_fusion",
        "batch_p2p_sync",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "deallocate_pipeline_outputs",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "use_cpu_initialization",
    ]


def test_megatron_takes_transformer_engines_optimizer(built: dict[str, dict[str, Any]]) -> None:
    name = built["optimizer"]["class"]
    assert name.startswith("transformer_engine.") and name.endswith(".FusedAdam")
