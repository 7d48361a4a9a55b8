"""Where a run happened: machine, versions, commit. Everything a reader needs to repeat it, no more."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
# A run writes these itself, so they do not make the code it measured another one.
_WRITTEN_BY_RUNS = ("benchmarks/results", "docs/benchmarks.md", "docs/transport.md")
_SHARED_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit() -> str:
    """Short hash, with "+changes" if tracked files differ from it; "unknown" without git's data."""
    if not (ROOT / ".git").exists():
        return "unknown"
    excluded = [f":(exclude){path}" for path in _WRITTEN_BY_RUNS]
    changes = _git("status", "--porcelain", "--", ".", *excluded)
    return _git("rev-parse", "--short=10", "HEAD") + ("+changes" if changes else "")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _cuda() -> dict[str, str]:
    fields = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()[0]
    name, driver = fields.split(", ")
    return {"gpu": name, "driver": driver}


def describe(device: str) -> dict[str, str | int | float]:
    """Hardware, versions, commit, time (UTC) and load average at the start of a run."""
    facts: dict[str, str | int | float] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }
    facts |= {name: version(name) for name in _SHARED_PACKAGES}
    return facts | (_cuda() if device == "cuda" else {})
