"""Where no Python 3.12 is, `make test-megatron-latest` says loudly that nothing was tested."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "scripts" / "megatron_latest.sh"


def test_without_python_312_nothing_is_tested_and_that_is_said_loudly(tmp_path: Path) -> None:
    nowhere = {"PYTHON312": str(tmp_path / "none"), "PYENV_ROOT": str(tmp_path)}
    run = subprocess.run(
        ["bash", str(SCRIPT)], env={**os.environ, **nowhere}, capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "SKIPPED: no Python 3.12 here, so the newest Megatron-Core was NOT tested." in run.stderr
    assert run.stdout == ""
