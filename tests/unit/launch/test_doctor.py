"""`opd doctor`: every check can fail, and the package index's apex is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_megatron.errors import EXIT_CONFIG
from opd_megatron.launch import doctor

Install = Callable[..., list[str]]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Put a distribution with given files on a path of its own; returns that path."""

    def make(name: str, version: str, *files: str, content: str = "") -> list[str]:
        metadata = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(content)
        return [str(tmp_path)]

    return make


def test_foreign_apex_is_refused_with_the_fix(install: Install) -> None:
    path = install("apex", "0.9.10.dev0", "apex/__init__.py", "apex/models.py")
    result = doctor.check_apex(path)
    assert not result.ok
    assert result.fix == "pip uninstall apex"
    assert "0.9.10.dev0" in result.detail


def test_foreign_apex_without_an_importable_module_is_refused(install: Install) -> None:
    assert not doctor.check_apex(install("apex", "0.9.10.dev0")).ok


def test_nvidia_apex_is_accepted(install: Install) -> None:
    files = ("apex/__init__.py", "apex/normalization/__init__.py", "apex/optimizers/__init__.py")
    assert doctor.check_apex(install("apex", "0.1", *files)).ok


def test_no_apex_is_accepted(tmp_path: Path) -> None:
    assert doctor.check_apex([str(tmp_path)]).ok


def test_doctor_command_ends_with_78_when_a_foreign_apex_is_found(install: Install) -> None:
    [folder] = install("apex", "0.9.10.dev0", "apex/__init__.py")
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron", "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_CONFIG, done.stdout + done.stderr
    assert "fix: pip uninstall apex" in done.stdout


@pytest.mark.parametrize(
    ("version", "ok"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)]
)
def test_python_outside_the_supported_range_is_refused(version: tuple[int, int], ok: bool) -> None:
    assert doctor.check_python(version).ok is ok


def test_a_python_that_compiles_at_every_start_is_told() -> None:
    said = doctor.check_python((3, 11), caches=False)
    assert said.ok and "PYTHONDONTWRITEBYTECODE" in said.detail
    assert "PYTHON" not in doctor.check_python((3, 11), caches=True).detail


@pytest.mark.parametrize(("version", "ok"), [("2.31", False), ("2.34", True), ("", False)])
def test_old_c_library_is_refused(version: str, ok: bool) -> None:
    assert doctor.check_glibc(version).ok is ok


@pytest.mark.parametrize(
    ("source", "cuda"),
    [
        ("cuda: str | None = None\n", None),
        ("from typing import Optional\ncuda: Optional[str] = '13.0'\n", "13.0"),
        ("cuda = '12.9'\n", "12.9"),
    ],
)
def test_torch_build_is_read_from_its_version_file(
    install: Install, source: str, cuda: str | None
) -> None:
    install("torch", "2.13.0", "torch/__init__.py")
    path = install("torch-rest", "1", "torch/version.py", content=source)
    assert doctor.torch_cuda(path) == cuda


def test_installed_torch_build_agrees_with_torch_itself() -> None:
    import torch

    assert doctor.torch_cuda() == torch.version.cuda


def test_untested_sglang_is_refused_and_the_tested_one_named(install: Install) -> None:
    result = doctor.check_allowed(
        "sglang", doctor.TESTED_SGLANG, "rollout", install("sglang", "9.9")
    )
    assert not result.ok
    assert f"sglang=={doctor.TESTED_SGLANG[-1]}" in result.fix


def test_role_that_is_not_installed_is_no_fault(tmp_path: Path) -> None:
    result = doctor.check_allowed("sglang", doctor.TESTED_SGLANG, "rollout", [str(tmp_path)])
    assert result.ok
    assert "extra `rollout`" in result.detail


def test_nemo_run_with_a_leptonai_it_cannot_import_is_refused(install: Install) -> None:
    install("nemo-run", "0.11.1")
    assert not doctor.check_nemo_run(install("leptonai", "0.47.1")).ok


def test_nemo_run_without_leptonai_is_refused(install: Install) -> None:
    assert not doctor.check_nemo_run(install("nemo-run", "0.11.1")).ok


def test_nemo_run_with_a_right_leptonai_is_accepted(install: Install) -> None:
    install("nemo-run", "0.11.1")
    assert doctor.check_nemo_run(install("leptonai", "0.27.3")).ok


def test_transformer_engine_without_its_binding_is_refused(install: Install) -> None:
    path = install("transformer-engine", "2.20.2")
    assert not doctor.check_transformer_engine(path).ok
    assert doctor.check_transformer_engine(install("transformer-engine-torch", "2.20.2")).ok


def test_memory_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert doctor.memory_limit(tmp_path) == 2000
    assert not doctor.check_memory(2000).ok


def test_hf_home_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert doctor.check_hf_home(str(tmp_path)).ok
    assert not doctor.check_hf_home(str(tmp_path / "absent")).ok


def test_run_checks_names_every_check_once() -> None:
    names = [result.name for result in doctor.run_checks()]
    assert len(names) == len(set(names)) == 13
