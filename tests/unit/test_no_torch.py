"""What a login node runs answers at once: no torch, no transformers, no SGLang, no Megatron."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sglang", "megatron", "matplotlib", "pyarrow")

# About 0.5 s on an idle core. CPU time, not wall time, so that other tests do not count; it still
# grows under load, and importing torch alone takes more than 2 s.
MAX_CPU_S = 1.5

# Runs the command as `opd` would, then tells which heavy modules it loaded and its CPU time.
PROBE = f"""
import resource, sys
from opd_megatron.cli.app import main
sys.argv = ["opd", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
used = resource.getrusage(resource.RUSAGE_SELF)
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print("PROBE", code, ",".join(loaded) or "-", used.ru_utime + used.ru_stime)
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


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_fast_command_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "PROBE" in done.stdout, done.stdout + done.stderr
    _, code, loaded, cpu_s = done.stdout.split("PROBE")[-1].join(("PROBE", "")).split()
    assert (code, loaded) == ("0", "-"), done.stdout + done.stderr
    assert float(cpu_s) < MAX_CPU_S


def test_probe_sees_a_heavy_import() -> None:
    code = PROBE.replace("main()\n", "import torch; raise SystemExit\n", 1)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "torch" in done.stdout.split("PROBE")[-1]
