"""Weights go from files to ranks and back without a whole copy of the model in the memory of any rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]

WORKER = Path(__file__).with_name("megatron_memory_worker.py")
REPOSITORY = Path(__file__).parents[2]
# Of the process itself while it works: Python objects, sockets, buffers of files and of gloo.
SLACK = 32_000_000
# glibc keeps freed blocks below a threshold that grows with use; counted shall be what is alive.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("memory")
    launch = [sys.executable, "-m", "opd_megatron.megatron.torchrun", "--opd-fork"]
    run = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(WORKER), str(work), "memory"],
        cwd=REPOSITORY,
        env={**os.environ, **FREED_AT_ONCE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((work / "memory.json").read_text())


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_loading_takes_a_ranks_shard_and_one_unit(seen: dict[str, Any], layout: str) -> None:
    assert seen["model"] > 400_000_000
    for rank in seen[layout]["ranks"]:
        assert rank["shard"] < 0.6 * seen["model"]
        assert rank["load"] < rank["shard"] + seen["unit"] + SLACK
        assert rank["load"] < 0.8 * seen["model"]
        assert rank["load"] > 0.9 * rank["shard"], "the measurement misses the parameters"


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_exporting_takes_a_few_units_on_rank_0_and_none_elsewhere(
    seen: dict[str, Any], layout: str
) -> None:
    first, *others = seen[layout]["ranks"]
    # The shards of a unit, and the unit joined from them.
    assert first["export"] < 2 * seen["unit"] + SLACK < 0.3 * seen["model"]
    for rank in others:
        assert rank["export"] < seen["unit"] + SLACK


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_the_export_is_the_model_in_files_of_bounded_size(
    seen: dict[str, Any], layout: str
) -> None:
    case = seen[layout]
    assert case["differ"] == []
    *weights, index = case["files"]
    assert index == "model.safetensors.index.json"
    assert weights == [
        f"model-{n:05d}-of-{len(weights):05d}.safetensors" for n in range(1, len(weights) + 1)
    ]
    assert len(weights) >= 5
