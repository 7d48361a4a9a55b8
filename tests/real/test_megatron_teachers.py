"""Teachers inside the learner: scores, losses and gradients in every layout.

The worker compares three teachers of one batch (one of another size, with an alias and offloaded weights, one whose
samples bring their scores along), and an arithmetic and a geometric mean of two of them, with `transformers` in
float64. Agreement with a real SGLang teacher is in test_sglang_contract.py, a whole run in
test_in_process_run.py. Not covered:
CUDA, where offloaded weights are pinned.
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

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TOLERANCE = 1e-5
LAYOUTS = ["dp2", "tp2_sp", "tp2_chunked_loss", "pp2", "pp2_interleaved", "cp2"]
COMBINED = ["tp2_pp2_sp", "tp2_cp2_sp", "tp2_dp2_sp", "pp2_cp2", "pp2_dp2_interleaved"]
FEW = ["sampled", "full reverse_kl", "union"]
ALL = [*FEW, "teacher_topk", "full forward_kl", "full jsd"]
OBJECTIVES = {
    "tp2_sp": ALL,
    "pp2_interleaved": ALL,
    "tp2_chunked_loss": ["sampled", "teacher_topk", "full forward_kl", "full jsd"],
}


def _run(work: Path, ranks: int, timeout_s: float) -> dict[str, Any]:
    launch = [sys.executable, "-m", "opd_megatron.megatron.torchrun", "--opd-fork"]
    worker = str(HERE / "megatron_teacher_worker.py")
    run = subprocess.run(
        [*launch, "--nproc-per-node", str(ranks), worker, str(work), "teachers"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((work / "teachers.json").read_text())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("teachers"), 2, 280)


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("teachers4"), 4, 800)


def _check_scores(case: dict[str, Any]) -> None:
    assert case["topk ids"] == 0
    assert case["second time"] == 0.0, "offloading must bring the same weights back"
    assert max(case.values()) <= TOLERANCE, case


def _check_step(case: dict[str, Any]) -> None:
    assert case["why_not_applied"] is None
    for name in ("loss", "norm", "gradient", "weights"):
        assert case[name] <= TOLERANCE, (name, case)
    assert case["teacher_s"] > 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_any_ids_and_of_the_whole_vocabulary_equal_transformers(
    cases: dict[str, Any], layout: str
) -> None:
    _check_scores(cases[f"scores-{layout}"])


@pytest.mark.parametrize(
    ("objective", "layout"),
    [(objective, layout) for layout in LAYOUTS for objective in OBJECTIVES.get(layout, FEW)],
)
def test_loss_and_gradient_equal_autograd_of_one_process(
    cases: dict[str, Any], objective: str, layout: str
) -> None:
    _check_step(cases[f"{objective}-{layout}"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", COMBINED)
def test_combined_layouts_give_the_scores_loss_and_gradient_of_one_process(
    combined: dict[str, Any], layout: str
) -> None:
    _check_scores(combined[f"scores-{layout}"])
    for objective in FEW:
        _check_step(combined[f"{objective}-{layout}"])


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_interleaved"])
def test_the_student_is_at_distance_zero_from_itself(cases: dict[str, Any], layout: str) -> None:
    assert max(cases[f"identity-{layout}"].values()) <= 1e-6


def test_the_entropy_filter_takes_the_exact_entropy(cases: dict[str, Any]) -> None:
    case = cases["filtered"]
    assert case["kept"] > 30 and case["chosen otherwise"] == 0
    assert case["entropy"] <= TOLERANCE


def test_the_overlap_of_both_top_k_is_the_same_in_every_layout(cases: dict[str, Any]) -> None:
    seen = [
        cases[f"full reverse_kl-{name}"]["overlap"] for name in LAYOUTS if "chunked" not in name
    ]
    assert 0.0 < seen[0] < 1.0
    assert seen == pytest.approx([seen[0]] * len(seen), rel=1e-6)
