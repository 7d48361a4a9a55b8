"""How an attempt ends: announced ends, hangs, signals, orphans, stolen ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from opd_megatron.config.schema import Recipe, ServerConfig
from opd_megatron.errors import ConfigError, RoleDied
from opd_megatron.launch.members import ATTEMPT_VARIABLE, scratch, scratch_folder
from opd_megatron.launch.role_command import RoleCommand
from opd_megatron.launch.roles import Server, server_role
from opd_megatron.launch.supervisor import MainSigns, Supervisor
from opd_megatron.lifeline import Pulse, beat
from opd_megatron.rundir import RunDir
from opd_megatron.serving.keys import new_keys, write_keys

SLEEP = "import time; time.sleep(60)"


def role(name: str, code: str, folder: Path) -> RoleCommand:
    return RoleCommand(name, [sys.executable, "-c", code], folder / f"{name}.log")


def signs(folder: Path, hang_timeout_s: float = 60.0) -> MainSigns:
    return MainSigns(folder / "finishing", folder / "serving", folder / "heartbeat", hang_timeout_s)


@pytest.mark.parametrize("code", [0, 1])
def test_a_role_may_end_once_the_controller_has_announced_that_all_is_committed(
    tmp_path: Path, code: int
) -> None:
    finish = f"import pathlib, time; pathlib.Path({str(tmp_path / 'finishing')!r}).touch(); "
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", finish + "time.sleep(2.5)", tmp_path))
        wait_for(tmp_path / "finishing")
        supervisor.start(role("learner", f"raise SystemExit({code})", tmp_path))
        assert supervisor.watch("controller", signs(tmp_path)) == 0


def test_a_role_that_ends_without_announcement_has_died_even_with_code_zero(tmp_path: Path) -> None:
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", SLEEP, tmp_path))
        supervisor.start(role("learner", "", tmp_path))
        with pytest.raises(RoleDied, match="learner ended with exit code 0"):
            supervisor.watch("controller", signs(tmp_path))


def test_the_dead_role_is_named_when_the_controller_fails_for_its_death(tmp_path: Path) -> None:
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", "raise SystemExit(75)", tmp_path))
        supervisor.start(
            role("rollout-0", "import time; time.sleep(1); raise SystemExit('x')", tmp_path)
        )
        with pytest.raises(RoleDied, match="rollout-0 ended with exit code 1"):
            supervisor.watch("controller", signs(tmp_path))


def test_a_role_that_calls_the_configuration_wrong_keeps_exit_code_78(tmp_path: Path) -> None:
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", SLEEP, tmp_path))
        supervisor.start(role("rollout-0", "raise SystemExit(78)", tmp_path))
        with pytest.raises(ConfigError, match="rollout-0 ended with exit code 78"):
            supervisor.watch("controller", signs(tmp_path))


def test_a_controller_without_heartbeat_is_named(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    began = time.monotonic()
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", code, tmp_path))
        with pytest.raises(RoleDied, match=r"controller hangs: no heartbeat for 0\.5 s"):
            supervisor.watch("controller", signs(tmp_path, hang_timeout_s=0.5))
    assert time.monotonic() - began < 10


def test_a_pulse_counts_by_the_watchers_own_presence(tmp_path: Path) -> None:
    now = [0.0]
    pulse = Pulse(tmp_path / "heartbeat", clock=lambda: now[0])
    for _ in range(10):
        now[0] += 1.0
        pulse.still_s()
    assert pulse.still_s() == 10.0
    now[0] += 3600.0  # the watcher itself was suspended
    assert pulse.still_s() == 12.0
    beat(tmp_path / "heartbeat")
    assert pulse.still_s() == 0.0


def wait_for(path: Path, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def supervised(identity: str, folder: Path) -> str:
    """A supervisor of one sleeping role that prints how it was interrupted and what is left of the attempt."""
    return f"""
import sys, psutil
from pathlib import Path
from opd_megatron.launch.role_command import RoleCommand
from opd_megatron.launch.supervisor import Interrupted, Supervisor
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
try:
    with Supervisor({identity!r}) as s:
        s.start(RoleCommand("controller", [sys.executable, "-c", sleep], Path({str(folder / "a.log")!r}), grace_s=1.0))
        print("up", flush=True)
        s.watch("controller")
except Interrupted as interruption:
    print(interruption.signal.name, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_everything_and_repeated_ones_do_no_harm(
    tmp_path: Path, number: signal.Signals
) -> None:
    identity = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", supervised(identity, tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    for _ in range(5):
        os.killpg(process.pid, number)
        time.sleep(0.1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, f"{number.name}\n")
    assert [p for p in psutil.process_iter() if of_attempt(p, identity)] == []


def test_a_signal_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    """`nohup opd run` must outlive its terminal."""
    code = (
        "import os, signal, sys; from opd_megatron.launch.supervisor import Supervisor\n"
        f"with Supervisor({uuid.uuid4().hex!r}): os.kill(os.getpid(), signal.SIGHUP); print('on', flush=True)"
    )
    nohup = ["bash", "-c", 'trap "" HUP; exec "$@"', "nohup"]
    command = [*nohup, sys.executable, "-c", code]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (seen.returncode, seen.stdout) == (0, "on\n"), seen.stderr


def of_attempt(process: psutil.Process, identity: str) -> bool:
    try:
        return process.environ().get(ATTEMPT_VARIABLE) == identity
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_orphans_are_adopted_and_collected(tmp_path: Path) -> None:
    """A role is killed whose child ends later: the supervisor collects the child, so no zombie stays."""
    child = tmp_path / "child"
    code = (
        "import os, pathlib, subprocess, sys;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.5)']);"
        f"pathlib.Path({str(child)!r}).write_text(str(p.pid));"
        "os.kill(os.getpid(), 9)"
    )
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", code, tmp_path))
        supervisor.start(role("rollout-0", SLEEP, tmp_path))
        assert supervisor.watch("controller") == -signal.SIGKILL
        pid = int(child.read_text())
        assert psutil.Process(pid).ppid() == os.getpid()
    assert not psutil.pid_exists(pid)


def test_a_stolen_port_ends_the_server_with_one_clear_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.attempt(1).root.mkdir(parents=True)
    write_keys(run.attempt(1).keys, new_keys())
    with socket.create_server(("127.0.0.1", 0)) as thief:
        port = thief.getsockname()[1]
        server = Server("rollout-0", f"http://127.0.0.1:{port}", "model", ServerConfig(), port)
        command = server_role(server, Recipe(device="cpu"), run, 1, 0)
        with Supervisor(uuid.uuid4().hex) as supervisor:
            supervisor.start(role("controller", SLEEP, tmp_path))
            supervisor.start(command)
            with pytest.raises(RoleDied) as raised:
                supervisor.watch("controller", signs(tmp_path))
    assert "rollout-0 ended with exit code 75" in str(raised.value)
    assert f"cannot bind 127.0.0.1:{port}: Address already in use" in str(raised.value)


def test_the_temporary_folder_of_an_attempt_goes_with_it() -> None:
    identity = uuid.uuid4().hex
    with scratch(identity) as environment:
        folder = Path(environment["TMPDIR"])
        assert folder == scratch_folder(identity)
        (folder / "left").write_text("by a killed server")
        # A Unix socket's path may have 107 bytes; SGLang's names take 12.
        assert len(str(folder)) < 90
    assert not folder.exists()
