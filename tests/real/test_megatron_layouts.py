"""Two optimizer steps in many layouts against plain torch on a float64 `transformers` model.

The first batch has uneven documents and an empty response, and needs several micro-batches; the
second is one sample, so that a data-parallel rank has no token. Clipping, weight decay and
importance masking are active. Not covered: FP8, Transformer Engine and NCCL, which need a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

WORKER = Path(__file__).with_name("megatron_worker.py")
REPOSITORY = Path(__file__).parents[2]
TOLERANCE = 1e-5
LAYOUTS = [
    "dp2",
    "dp2_distributed_optimizer",
    "tp2",
    "tp2_sequence_parallel",
    "tp2_recompute",
    "pp2",
    "cp2",
]
LAYOUTS_4 = [
    "tp2_pp2_sp",
    "tp2_cp2_sp",
    "pp2_dp2_distributed_optimizer",
    "tp2_dp2",
    "cp2_dp2",
    "pp4",
]
MODELS = ["untied", "tied"]
SAME_LAYOUT = ["tp2-to-tp2", "distributed_optimizer-dp2-to-dp2"]
OTHER_LAYOUT = ["tp2-to-pp2", "pp2-to-dp2", "distributed_optimizer-dp2-to-tp2"]

Results = dict[str, dict[str, Any]]


def _run(work: Path, ranks: int) -> Results:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*launch, "--nproc-per-node", str(ranks), str(WORKER), str(work), "layouts"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((work / "layouts.json").read_text())


def _check(case: dict[str, Any]) -> None:
    assert case["applied"] == 1.0
    assert 0.05 < case["masked_frac"] < 0.95, "the batch must exercise the correction"
    for name in ("loss", "norm", "logprobs", "gradient", "weights"):
        if name in case:  # the distributed optimizer keeps only a shard of the gradient
            assert case[name] <= TOLERANCE, name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _run(tmp_path_factory.mktemp("layouts2"), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_layout_gives_the_loss_gradient_and_weights_of_one_process(
    two_ranks: Results, model: str, layout: str
) -> None:
    _check(two_ranks[f"{model}-{layout}"])


@pytest.mark.parametrize("move", SAME_LAYOUT)
def test_resume_in_the_same_layout_is_bitwise(two_ranks: Results, move: str) -> None:
    assert two_ranks[move] == {"steps_loaded": 1.0, "weights": 0.0}


@pytest.mark.parametrize("move", OTHER_LAYOUT)
def test_resume_in_another_layout_goes_on_the_same(two_ranks: Results, move: str) -> None:
    assert two_ranks[move]["steps_loaded"] == 1.0
    assert two_ranks[move]["weights"] <= TOLERANCE


@pytest.mark.parametrize("layout", ["dp2", "dp2_distributed_optimizer", "tp2", "pp2"])
def test_a_nan_on_one_rank_stops_the_step_on_all(two_ranks: Results, layout: str) -> None:
    case = two_ranks[f"broken-{layout}"]
    assert "the gradient is not finite" in case["why_not_applied"]
    assert case["parameter"] in case["why_not_applied"]
    assert case["changed"] == 0
    assert (case["healthy_why_not"], case["steps"]) == (None, 1)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _run(tmp_path_factory.mktemp("layouts4"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS_4)
@pytest.mark.parametrize("model", MODELS)
def test_combined_layout_gives_the_loss_gradient_and_weights_of_one_process(
    four_ranks: Results, model: str, layout: str
) -> None:
    _check(four_ranks[f"{model}-{layout}"])
