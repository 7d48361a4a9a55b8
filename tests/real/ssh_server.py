"""An sshd of one's own on loopback: the login node of a cluster, as seen from somewhere else."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")
_PATH = "/usr/sbin:/usr/bin:/bin"


def missing() -> list[str]:
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


@dataclass(frozen=True)
class Login:
    """`programs` holds an `ssh` that knows the server's key, as that of a user who has been there before."""

    port: int
    user: str
    identity: Path
    programs: Path


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def _client(folder: Path, port: int, host_key: Path) -> Path:
    known = folder / "known_hosts"
    public = host_key.with_name(f"{host_key.name}.pub").read_text()
    known.write_text(f"[127.0.0.1]:{port} {public}")
    programs = folder / "programs"
    programs.mkdir()
    ssh = programs / "ssh"
    ssh.write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh", path=_PATH)} -o UserKnownHostsFile={known} "$@"\n'
    )
    ssh.chmod(0o755)
    return programs


@contextmanager
def login_node(folder: Path, environment: Mapping[str, str]) -> Generator[Login]:
    """Serve this user, with one key and `environment` in every session, until the end of the block."""
    host_key, identity = _key(folder / "host"), _key(folder / "user")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = " ".join(f'"{name}={value}"' for name, value in environment.items())
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {host_key}\nAuthorizedKeysFile {identity}.pub\n"
        f"PidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
        f"PermitRootLogin prohibit-password\nStrictModes no\nSubsystem sftp internal-sftp\nSetEnv {settings}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = shutil.which("sshd", path=_PATH)
    assert sshd is not None
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen(
            [sshd, "-D", "-e", "-f", str(folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < deadline, (
                folder / "sshd.log"
            ).read_text()
            time.sleep(0.1)
        yield Login(port, getpass.getuser(), identity, _client(folder, port, host_key))
    finally:
        server.terminate()
        server.wait(timeout=10)
