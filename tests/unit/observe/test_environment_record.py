"""environment.json: versions without heavy imports, no secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from opd_megatron.observe.environment import describe_environment, git_state

ROOT = Path(__file__).resolve().parents[3]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_versions_and_machine_are_recorded() -> None:
    found = describe_environment()
    assert found["packages"]["torch"] and found["cores"] >= 1 and found["memory_gib"] > 0
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    json.dumps(found)


def test_environment_variables_are_not_recorded() -> None:
    code = (
        "import json, sys\n"
        "from opd_megatron.observe.environment import describe_environment\n"
        "print(json.dumps(describe_environment()))\n"
        "assert 'torch' not in sys.modules\n"
    )
    secret = "hunter2-hunter2"
    done = subprocess.run(
        [sys.executable, "-c", code, secret],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": secret, "HOSTNAME": secret},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "packages" in done.stdout and secret not in done.stdout


def test_git_state_tells_clean_from_dirty(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
