"""What a login node runs answers at once: no torch, no transformers, no SGLang, no Megatron."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sglang", "megatron", "matplotlib", "pyarrow")

# About 0.5 s on an idle core. CPU time, not wall time, so that other tests do not count; it still
# grows under load, and importing torch alone takes more than 2 s.
MAX_CPU_S = 1.5

# Runs the commands as `opd` would, one after the other (lines of stdin), and tells after each which heavy modules are
# loaded and its CPU time: that of the start and its own.
PROBE = f"""
import resource, shlex, sys
from opd_megatron.cli.app import main

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

start_s = used()
for line in sys.stdin:
    began, code = used(), 0
    sys.argv = ["opd", *shlex.split(line)]
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print("PROBE", code, ",".join(loaded) or "-", start_s + used() - began, flush=True)
"""

COMMANDS = [
    ("--help",),
    ("run", "--help"),
    ("recipes", "list"),
    ("recipes", "show", "demo"),
    ("validate", "demo"),
    ("validate", "qwen3_4b_base_from_qwen3_32b_32gpu_h100_bf16", "--offline"),
    ("estimate", "qwen3_4b_base_from_qwen3_32b_32gpu_h100_bf16"),
    ("objectives",),
    ("objectives", "--json"),
    ("doctor",),
    ("submit", "demo", "--cluster", "cpu-test", "--via", "sbatch", "--dry-run"),
]


def probe(code: str, commands: list[tuple[str, ...]]) -> list[list[str]]:
    """(exit code, heavy modules, CPU seconds) of each command, as texts."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="".join(shlex.join(command) + "\n" for command in commands),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("PROBE")]
    assert len(found) == len(commands), done.stdout + done.stderr
    return found


@pytest.fixture(scope="module")
def probed() -> dict[tuple[str, ...], list[str]]:
    return dict(zip(COMMANDS, probe(PROBE, COMMANDS), strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_fast_command_loads_nothing_heavy(
    probed: dict[tuple[str, ...], list[str]], command: tuple[str, ...]
) -> None:
    code, loaded, cpu_s = probed[command]
    assert (code, loaded) == ("0", "-")
    assert float(cpu_s) < MAX_CPU_S


def test_probe_sees_a_heavy_import() -> None:
    code = PROBE.replace("        main()\n", "        import torch\n", 1)
    assert probe(code, [("--help",)])[0][1] == "torch"
