"""Processes of a run: the dead one is named, nothing survives, not even a supervisor's SIGKILL."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from opd_megatron.errors import ConfigError, RoleDied
from opd_megatron.launch import lock
from opd_megatron.launch.members import ATTEMPT_VARIABLE, kill_attempt
from opd_megatron.launch.ports import PortReservations
from opd_megatron.launch.role_command import RoleCommand, tail
from opd_megatron.launch.supervisor import MainSigns, Supervisor

SLEEP = "import time; time.sleep(60)"
# A process that starts a grandchild in a session of its own, as torchrun does.
NESTED = (
    "import subprocess, sys, time;"
    f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True); time.sleep(60)"
)


def role(name: str, code: str, folder: Path) -> RoleCommand:
    return RoleCommand(name, [sys.executable, "-c", code], folder / f"{name}.log")


def members(attempt_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(ATTEMPT_VARIABLE) == attempt_id:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_the_exit_code_of_the_main_process_is_returned_and_the_rest_is_ended(
    tmp_path: Path,
) -> None:
    identity = uuid.uuid4().hex
    with Supervisor(identity) as supervisor:
        supervisor.start(role("server", NESTED, tmp_path))
        supervisor.start(role("controller", "raise SystemExit(75)", tmp_path))
        assert supervisor.watch("controller") == 75
    assert members(identity) == []


def test_a_dead_role_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", SLEEP, tmp_path))
        supervisor.start(role("teacher-main-0", "raise SystemExit('out of memory')", tmp_path))
        with pytest.raises(RoleDied) as raised:
            supervisor.watch("controller")
    assert "teacher-main-0 ended with exit code 1" in str(raised.value)
    assert "| out of memory" in str(raised.value)


def test_a_killed_role_is_named_with_its_signal(tmp_path: Path) -> None:
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", SLEEP, tmp_path))
        supervisor.start(
            role("learner", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
        )
        with pytest.raises(RoleDied, match="learner ended with signal SIGKILL"):
            supervisor.watch("controller")


def test_a_main_process_is_not_waited_for_once_the_attempt_has_ended_elsewhere(
    tmp_path: Path,
) -> None:
    ended, identity = tmp_path / "ended", uuid.uuid4().hex
    with Supervisor(identity) as supervisor:
        supervisor.start(
            role("controller", f"open({str(ended)!r}, 'w').close(); {SLEEP}", tmp_path)
        )
        with pytest.raises(RoleDied, match="another role has ended the attempt"):
            supervisor.watch("controller", is_over=ended.exists)
    assert members(identity) == []


def test_sigkill_of_the_supervisor_takes_its_processes_along(tmp_path: Path) -> None:
    identity = uuid.uuid4().hex
    code = (
        "from pathlib import Path; import sys, time\n"
        "from opd_megatron.launch.role_command import RoleCommand\n"
        "from opd_megatron.launch.supervisor import Supervisor\n"
        f"with Supervisor({identity!r}) as s:\n"
        f"    s.start(RoleCommand('a', [sys.executable, '-c', {SLEEP!r}], Path({str(tmp_path / 'a.log')!r})))\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert len(members(identity)) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: members(identity) == [])


def test_leftovers_are_found_however_deep_they_were_started(tmp_path: Path) -> None:
    identity = uuid.uuid4().hex
    environment = {**os.environ, ATTEMPT_VARIABLE: identity}
    process = subprocess.Popen([sys.executable, "-c", NESTED], env=environment)
    wait_until(lambda: len(members(identity)) == 2)
    assert len(kill_attempt(identity)) == 2
    process.wait()
    assert members(identity) == []


def test_a_living_run_keeps_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    code = (
        "from pathlib import Path; import time\n"
        "from opd_megatron.launch import lock\n"
        f"with lock.hold(Path({str(path)!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=f"pid {process.pid}"), lock.hold(path):
        pass
    process.kill()
    process.wait()
    with lock.hold(path):
        pass


def test_a_file_system_without_locks_is_said_and_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lustre mounted without `flock` answers so."""

    def refuse(_handle: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.hold(tmp_path / "run.lock"):
        pass
    assert "Function not implemented: without locks" in capsys.readouterr().err


def test_reserved_ports_are_not_given_twice() -> None:
    with PortReservations() as first, PortReservations() as second:
        ports = [reservations.reserve() for reservations in (first, second) for _ in range(20)]
    assert len(set(ports)) == 40
    assert all(port < 32768 for port in ports)


def test_the_tail_of_a_log_ends_where_torchrun_has_said_which_rank_ended(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    report = "E1 x 7 lib/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) rank: 0"
    log.write_text("\n".join(["ValueError: the cause", report, *("more of it" for _ in range(40))]))
    assert tail(log) == f"  | ValueError: the cause\n  | {report}"
    log.write_text(report)
    assert "failed (exitcode: 1)" in tail(log)
    first = "torchrun: opd-rank-1 ended with SIGKILL"
    log.write_text("\n".join([first, "RuntimeError: Connection closed by peer", report]))
    assert tail(log) == f"  | {first}"


def serving(folder: Path) -> MainSigns:
    (folder / "serving").touch()
    return MainSigns(folder / "finishing", folder / "serving", folder / "heartbeat", 60.0)


# A server that starts a worker in a session of its own, writes both pids, and dies.
MORTAL = (
    "import os, subprocess, sys, time;"
    f"worker = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True);"
    "print(os.getpid(), worker.pid, flush=True); time.sleep(0.3); os.kill(os.getpid(), 9)"
)


def test_a_server_that_dies_is_started_again_as_often_as_it_may_be(tmp_path: Path) -> None:
    said: list[str] = []
    server = RoleCommand(
        "rollout-0", [sys.executable, "-c", MORTAL], tmp_path / "server.log", max_restarts=2
    )
    identity = uuid.uuid4().hex
    with Supervisor(identity, say=said.append) as supervisor:
        supervisor.start(role("controller", SLEEP, tmp_path))
        supervisor.start(server)
        with pytest.raises(RoleDied, match="rollout-0 ended with signal SIGKILL"):
            supervisor.watch("controller", serving(tmp_path))
        lives = [line.split() for line in server.log.read_text().splitlines()]
        assert len(lives) == 3
        # The workers of the first two lives were ended with them.
        assert not any(psutil.pid_exists(int(worker)) for _, worker in lives[:2])
    assert [line.split(";")[0] for line in said] == [
        f"rollout-0 ended with signal SIGKILL and is started again ({n} of 2)" for n in (1, 2)
    ]
    assert members(identity) == []


@pytest.mark.parametrize(
    ("code", "mark"), [("raise SystemExit(1)", "absent"), ("raise SystemExit(78)", "serving")]
)
def test_a_server_that_never_worked_or_calls_the_configuration_wrong_ends_the_attempt(
    tmp_path: Path, code: str, mark: str
) -> None:
    signs = MainSigns(tmp_path / "finishing", tmp_path / mark, tmp_path / "heartbeat", 60.0)
    if mark == "serving":
        (tmp_path / mark).touch()
    server = RoleCommand("a", [sys.executable, "-c", code], tmp_path / "a.log", max_restarts=5)
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(role("controller", "import time; time.sleep(30)", tmp_path))
        supervisor.start(server)
        with pytest.raises((RoleDied, ConfigError), match="a ended with exit code"):
            supervisor.watch("controller", signs)
