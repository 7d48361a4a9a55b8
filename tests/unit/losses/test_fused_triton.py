"""The tests of `tests/gpu` on a CPU, where Triton interprets its kernels: same claims, same code.

A process of its own, because Triton decides at import whether it compiles or interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real  # Triton itself, in a process of its own

ROOT = Path(__file__).parents[3]


def run_gpu_tests(**variables: str) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_triton_kernels_equal_float64_under_the_interpreter() -> None:
    report = run_gpu_tests(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    passed = int(report.rsplit(" passed", 1)[0].split()[-1].lstrip("\n,"))
    assert passed >= 35, report


@pytest.mark.slow
def test_gpu_tests_are_collected_and_skipped_without_a_device() -> None:
    report = run_gpu_tests(TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert " passed" not in report and "no CUDA device, and TRITON_INTERPRET is not 1" in report
