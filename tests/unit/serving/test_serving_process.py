"""What the process entry does before SGLang is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from opd_megatron.errors import EXIT_CONFIG, EXIT_RETRY
from opd_megatron.serving.keys import new_keys, write_keys

CHILD = """
import os, subprocess, sys, time
from opd_megatron.serving.sglang_main import die_with_parent
die_with_parent(os.getppid())
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def start_server_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opd_megatron.serving.sglang_main", "--device", "cpu"]
    return subprocess.run(
        [*command, "--host", "127.0.0.1", *arguments], capture_output=True, text=True, timeout=60
    )


def test_a_server_process_dies_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)


def test_a_server_whose_parent_is_gone_already_does_not_start(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, new_keys())
    stranger = str(os.getppid())
    done = start_server_process("--port", "1", "--keys-file", str(keys), "--parent-pid", stranger)
    assert done.returncode == EXIT_RETRY


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, new_keys())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start_server_process("--port", str(port), "--keys-file", str(keys))
    assert done.returncode == EXIT_RETRY
    assert done.stderr == f"sglang server: cannot bind 127.0.0.1:{port}: Address already in use\n"


def test_missing_keys_are_a_configuration_error(tmp_path: Path) -> None:
    done = start_server_process("--port", "1", "--keys-file", str(tmp_path / "absent.json"))
    assert done.returncode == EXIT_CONFIG
    assert "absent.json" in done.stderr
