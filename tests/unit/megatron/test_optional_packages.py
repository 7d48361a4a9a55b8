"""What the builder takes where it is installed: NVIDIA's kernels; and what it refuses: another package's name.

Packages are folders on the path; nothing of them is imported. That Megatron-Core then really takes Transformer Engine's
optimizer is in tests/real/test_megatron_transformer_engine.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.megatron.model import _device_settings
from opd_megatron.megatron.version import check_apex


def install(site: Path, *files: str) -> None:
    for name in files:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_no_apex_and_nvidias_apex_are_fine(site: Path) -> None:
    check_apex()
    install(site, "apex/__init__.py", "apex/normalization/__init__.py")
    install(site, "apex/optimizers/__init__.py")
    check_apex()


@pytest.mark.parametrize("file", ["apex/__init__.py", "apex.py"])
def test_the_learner_refuses_another_package_called_apex(site: Path, file: str) -> None:
    install(site, file)
    with pytest.raises(ConfigError, match=r"not NVIDIA Apex.*; pip uninstall apex"):
        check_apex()


@pytest.mark.parametrize("has_kernel", [True, False])
def test_weight_gradients_are_fused_where_nvidias_kernel_is_there(
    site: Path, has_kernel: bool
) -> None:
    install(site, "transformer_engine/__init__.py")
    if has_kernel:
        install(site, "fused_weight_gradient_mlp_cuda.py")
    cuda, cpu = _device_settings("cuda"), _device_settings("cpu")
    assert cuda["gradient_accumulation_fusion"] is has_kernel
    assert not cpu["gradient_accumulation_fusion"]
    for fusion in ("apply_rope_fusion", "masked_softmax_fusion", "bias_activation_fusion"):
        assert cuda[fusion] and not cpu[fusion]
