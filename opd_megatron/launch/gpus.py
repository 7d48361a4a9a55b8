"""Whether the GPUs can run the precision: those that the recipe's name says, and those of this machine. No torch.

A login node has no GPU: there the name alone is checked, and each learner rank checks its own device before it loads
weights.
"""

from __future__ import annotations

import shutil
import subprocess

from opd_megatron.config.recipe_facts import facts_of
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.planner.hardware import DEVICES
from opd_megatron.megatron.precision import Gpu, Version, check_gpu

_QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader")
_TIMEOUT_S = 20


def parse_cuda(text: str | None) -> Version | None:
    """ "13.0" as numbers; None where torch is absent or a CPU build."""
    major, _, minor = (text or "").partition(".")
    return (int(major), int(minor.split(".")[0])) if major.isdigit() and minor else None


def parse_gpus(listing: str, cuda: Version | None = None) -> list[Gpu]:
    """One GPU per line `NAME, MAJOR.MINOR`; `cuda`: that torch is built for, None when unknown."""
    gpus: list[Gpu] = []
    for line in listing.splitlines():
        name, _, capability = line.rpartition(",")
        major, dot, minor = capability.strip().partition(".")
        if dot and major.isdigit() and minor.isdigit():
            gpus.append(Gpu(name.strip(), (int(major), int(minor)), cuda))
    return gpus


def visible_gpus(cuda: Version | None = None) -> list[Gpu]:
    """GPUs of this machine; none without a driver. `cuda` as for `parse_gpus`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    found = subprocess.run(
        [program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    return parse_gpus(found.stdout, cuda) if found.returncode == 0 else []


def check_named_hardware(recipe: Recipe) -> None:
    """Refuse a precision that the hardware in the recipe's name can not run; a name without any is let through.

    Raises:
        ConfigError: every reason.
    """
    device = DEVICES.get(facts_of(recipe).hardware)
    if recipe.device != "cuda" or device is None or device.capability is None:
        return
    try:
        check_gpu(recipe.learner, Gpu(device.name.upper(), device.capability, None))
    except ConfigError as error:
        raise ConfigError(
            f"{error} (name={recipe.name!r} says {device.name}; for other GPUs, name the recipe after them)"
        ) from None


def check_precision(recipe: Recipe, gpus: list[Gpu]) -> None:
    """Refuse a precision that a GPU of this machine can not run.

    Raises:
        ConfigError: every reason of the first such GPU.
    """
    if recipe.device != "cuda":
        return
    for number, gpu in enumerate(gpus):
        try:
            check_gpu(recipe.learner, gpu)
        except ConfigError as error:
            raise ConfigError(f"{error} (GPU {number} of this machine)") from None
