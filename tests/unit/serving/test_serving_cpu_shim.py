"""The stand-ins, each checked in a fresh interpreter: they change what `import` means."""

from __future__ import annotations

import subprocess
import sys

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sgl_kernel", "torchvision", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name in ("sgl_kernel", "torchvision", "triton") else real(name, package)
importlib.util.find_spec = find_spec
from opd_megatron.serving.cpu_shim import KernelUnavailable, install
packages = install()
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_a_kernel_that_is_called_is_loud_and_one_that_is_imported_is_not() -> None:
    code = """
from sgl_kernel import fused_add, SomeType
from sgl_kernel.deep.er import other
import torch
assert packages == ("sgl_kernel", "torchvision", "triton")
for call in (lambda: fused_add(torch.ones(1)), lambda: other(), lambda: fused_add(1, out=2)):
    try:
        call()
    except KernelUnavailable as error:
        print(error)
    else:
        raise SystemExit("silent")
SomeType(1, a=2)
"""
    lines = run(code).splitlines()
    assert lines[0].startswith("sgl_kernel.fused_add was called")
    assert lines[1].startswith("sgl_kernel.deep.er.other was called")
    assert len(lines) == 3


def test_decorators_of_an_absent_compiler_return_the_function() -> None:
    code = """
import triton
import triton.language as tl
@triton.jit
def kernel(x, block: tl.constexpr):
    return x
@triton.autotune(configs=[triton.Config({"a": 1})], key=["n"])
@triton.jit
def tuned(x):
    return x
assert kernel(3, 1) == 3 and tuned(4) == 4
"""
    run(code)


def test_transformers_still_knows_that_torchvision_is_absent() -> None:
    code = """
from transformers.utils import is_torchvision_available
import torchvision.transforms as transforms
assert transforms.InterpolationMode.BICUBIC.value == "bicubic"
print(is_torchvision_available())
"""
    assert run(code) == "False"


def test_a_second_installation_changes_nothing() -> None:
    code = """
before = list(sys.meta_path)
assert install() == packages
assert sys.meta_path == before
"""
    run(code)
