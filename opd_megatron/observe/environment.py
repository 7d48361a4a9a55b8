"""What a run ran on: versions, machine, commit; `environment.json` and a part of the report.

Versions come from package metadata, so nothing heavy is imported. Left out on purpose: environment
variables, host and user names, and command lines, which can hold secrets.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from opd_megatron import __version__

ENVIRONMENT_JSON = "environment.json"
PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "transformer-engine", "numpy")
_GIT_TIMEOUT_S = 10.0


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a reading git command, None when git or the repository can not be used."""
    # Without optional locks, or a status would write to the index of somebody else's checkout.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of a checkout and whether its files differ from it.

    Args:
        folder: root of the checkout.

    Returns:
        `{"commit": str, "dirty": bool}`, or None when `folder` is not the root of a checkout.
    """
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    if commit is None or status is None:
        return None
    return {"commit": commit, "dirty": bool(status)}


def describe_environment() -> dict[str, Any]:
    """The content of `environment.json`; a package that is not installed is None."""
    return {
        "opd_megatron": __version__,
        "git": git_state(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
