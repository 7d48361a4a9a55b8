"""The container recipe can not be built here, so what can be read of it is checked: it fits the pins it installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "slurm/container/Dockerfile").read_text()
PLATFORMS = ("x86_64", "aarch64")


def pins(platform: str) -> dict[str, str]:
    """Name -> version."""
    lines = (ROOT / f"locks/production-{platform}.txt").read_text().splitlines()
    found = (re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def argument(name: str) -> str:
    found = re.search(rf'^ARG {name}="?([^"\n]+)"?$', DOCKERFILE, re.MULTILINE)
    assert found is not None, name
    return found[1]


def minor(version: str) -> list[str]:
    return version.split(".")[:2]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_toolkit_of_the_image_is_the_one_torch_was_built_with(platform: str) -> None:
    """Apex refuses to compile with another minor version."""
    image = argument("CUDA_IMAGE").partition(":")[2]
    assert minor(image) == minor(pins(platform)["nvidia-cuda-runtime"])
    assert "cudnn-devel" in image


def test_both_platforms_have_the_same_stack() -> None:
    ours, theirs = (pins(platform) for platform in PLATFORMS)
    differ = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert differ == set()
    assert {"torch", "sglang", "megatron-core", "transformer-engine-torch"} <= set(ours) & set(
        theirs
    )
    # Its three packages refuse each other in different versions.
    names = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    assert len({ours[name] for name in names}) == 1


def test_torch_and_transformer_engine_compile_for_the_same_gpus() -> None:
    torch, engine = argument("CUDA_ARCHITECTURES"), argument("NVTE_CUDA_ARCHITECTURES")
    assert torch.replace(".", "").split(";") == engine.split(";")


def test_what_is_fetched_is_pinned() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", argument("APEX_COMMIT"))
    by_name = re.search(
        r"pip install --no-cache-dir --no-deps (wheel==(?:.|\\\n)*?)\n\n", DOCKERFILE
    )
    assert by_name is not None
    packages = by_name[1].replace("\\\n", " ").split()
    assert len(packages) == 7 and all("==" in package for package in packages)
    # The index has another project of that name.
    assert not any("apex" in pins(platform) for platform in PLATFORMS)
