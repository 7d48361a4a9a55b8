"""A real Slurm on one machine: munge, slurmctld and several virtual slurmd nodes, all on loopback.

As root every node has a host name of its own (a UTS namespace), where that is allowed; else all share the machine's.
Everything lives below one folder, and every daemon is ended by its own pid. Two waits are shorter than Slurm's own,
though not so short that Slurm takes a busy machine for a dead node: one that died is noticed after 30 s
(`SlurmdTimeout`), and a requeued job waits 15 s instead of 121 (`cred_expire`).

Left out: accounting, cgroups, PMIx, real GPUs, `--segment` (this Slurm is older than it).
"""

from __future__ import annotations

import getpass
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from opd_megatron.launch.ports import PortReservations

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")
_READY_S = 120


def missing_programs() -> list[str]:
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def _may_name_nodes() -> bool:
    """A container may be root and still not allowed to make namespaces."""
    script = "hostname probe && mount --bind /etc/hosts /etc/hosts"
    probe = ["unshare", "--uts", "--mount", "sh", "-c", script]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


@dataclass
class Cluster:
    """Started by `start`; nodes are n1, n2, ...

    Args:
        folder: private; its path is short, since munge's socket lies in it.
        own_names: whether every node has a host name of its own.
    """

    folder: Path
    num_nodes: int
    cpus: int = 8
    own_names: bool = field(default_factory=lambda: _may_name_nodes())
    # Not ephemeral ones, which any outgoing connection may take before a daemon binds them.
    ports: PortReservations = field(default_factory=PortReservations)

    @property
    def nodes(self) -> list[str]:
        return [f"n{i + 1}" for i in range(self.num_nodes)]

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
        return {**os.environ, "SLURM_CONF": str(self.folder / "etc/slurm.conf"), "PATH": path}

    def call(self, *argv: str, timeout: float = 120, **options) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, bounded in time: clients wait for ever on a controller that is down."""
        return subprocess.run(
            list(argv),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )

    def _config(self) -> str:
        d, user = self.folder, getpass.getuser()
        name = socket.gethostname().split(".")[0]
        ports = [self.ports.reserve() for _ in range(self.num_nodes + 1)]
        lines = [
            "ClusterName=opdtest",
            f"SlurmctldHost={name}(127.0.0.1)",
            *(f"SlurmUser={user}", f"SlurmdUser={user}"),
            *("AuthType=auth/munge", "CredType=cred/munge"),
            f"AuthInfo=socket={d}/run/munge.socket,cred_expire=15",
            f"SlurmctldPort={ports[0]}",
            "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
            *(f"StateSaveLocation={d}/state", f"SlurmdSpoolDir={d}/spool/%n"),
            *(f"SlurmctldPidFile={d}/run/slurmctld.pid", f"SlurmdPidFile={d}/run/slurmd-%n.pid"),
            *(f"SlurmctldLogFile={d}/log/slurmctld.log", f"SlurmdLogFile={d}/log/slurmd-%n.log"),
            *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none"),
            *("JobAcctGatherType=jobacct_gather/none", "SwitchType=switch/none", "MpiDefault=none"),
            *("ReturnToService=2", "SlurmctldTimeout=10", "SlurmdTimeout=30", "InactiveLimit=0"),
            # Longer than their defaults of 10 s, after which Slurm requeues a job whose start was only slow.
            *("BatchStartTimeout=120", "MessageTimeout=60"),
            *(
                "MinJobAge=300",
                "KillWait=15",
                "WaitTime=0",
                "UnkillableStepTimeout=20",
                "JobRequeue=1",
            ),
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0",
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU"),
            *("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"),
            "SlurmdParameters=config_overrides",
            *("AccountingStorageType=accounting_storage/none", "JobCompType=jobcomp/none"),
        ]
        for node, port in zip(self.nodes, ports[1:], strict=True):
            host = node if self.own_names else name
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                f"RealMemory=1000 State=UNKNOWN"
            )
        lines.append(
            "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=60"
        )
        lines.append(
            "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF"
        )
        return "\n".join(lines) + "\n"

    def start(self) -> None:
        """Bring everything up and wait until every node is idle."""
        d = self.folder
        self.ports.__enter__()
        for name in ("etc", "run", "log", "state", "spool"):
            (d / name).mkdir()
        (d / "munge").mkdir(mode=0o700)
        d.chmod(0o711)
        key = d / "munge/key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (d / "etc/slurm.conf").write_text(self._config())
        (d / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (d / "etc/hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        self._check(
            "munged", "--force", "--num-threads=2", f"--key-file={key}", f"--socket={d}/run/munge.socket",
            f"--pid-file={d}/munge/munged.pid", f"--log-file={d}/munge/munged.log", f"--seed-file={d}/munge/seed",
        )  # fmt: skip
        self._check("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle()

    def _check(self, *argv: str) -> None:
        # Daemons keep an inherited pipe open for ever: files take their output.
        with (self.folder / "log/start.log").open("ab") as log:
            done = subprocess.run(
                list(argv),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=120,
            )
        assert done.returncode == 0, (argv, (self.folder / "log/start.log").read_text())

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        if self.own_names:
            script = f"hostname {node}; mount --bind {self.folder}/etc/hosts /etc/hosts; exec slurmd -N {node} -c"
            self._check("unshare", "--uts", "--mount", "sh", "-c", script)
        else:
            self._check("slurmd", "-N", node, "-c")

    def wait_idle(self) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            found = self.call("sinfo", "-h", "-N", "-o", "%N %T").stdout.split("\n")
            if {f"{node} idle" for node in self.nodes} <= set(found):
                return
            assert time.monotonic() < deadline, (found, self._logs())
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(p.read_text()[-2000:] for p in (self.folder / "log").glob("*.log"))

    def _pid(self, path: Path) -> psutil.Process | None:
        try:
            return psutil.Process(int(path.read_text()))
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None

    def kill_node(self, node: str) -> None:
        """What a power cut does: slurmd, its step daemons and everything they run die at once."""
        daemon = self._pid(self.folder / f"run/slurmd-{node}.pid")
        assert daemon is not None
        # slurmstepd leaves its parent; its command line does not name the node, but its spool folder is open.
        victims = [daemon]
        for process in psutil.process_iter():
            try:
                if process.name() == "slurmstepd" and self._is_of(process, node):
                    victims += [*process.children(recursive=True), process]
            except psutil.NoSuchProcess:
                continue
        for victim in victims:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue

    @contextmanager
    def hidden_from(self, node: str, folder: Path, options: str = "ro") -> Generator[None]:
        """While this lasts, `node` sees an empty folder that it can not write to there. Needs `own_names`."""
        inside = self._inside(node)
        self._check(*inside, "mount", "-t", "tmpfs", "-o", options, "none", str(folder))
        try:
            yield
        finally:
            self._check(*inside, "umount", "--lazy", str(folder))

    @contextmanager
    def hangs_on(self, node: str, folder: Path, file: str) -> Generator[None]:
        """While this lasts, `node` sees nothing in `folder` but `file`, and who opens that waits for ever."""
        with self.hidden_from(node, folder, "rw"):
            made = folder / file
            script = f"mkdir -p {shlex.quote(str(made.parent))} && mkfifo {shlex.quote(str(made))}"
            self._check(*self._inside(node), "sh", "-c", script)
            yield

    def _inside(self, node: str) -> tuple[str, ...]:
        """Words before a command that is to see the files that `node` sees."""
        daemon = self._pid(self.folder / f"run/slurmd-{node}.pid")
        assert daemon is not None
        return ("nsenter", "--mount", f"--target={daemon.pid}")

    @contextmanager
    def paused(self) -> Generator[None]:
        """Jobs are taken but not started while this lasts."""
        self._set_batch("down")
        try:
            yield
        finally:
            self._set_batch("up")

    def _set_batch(self, state: str) -> None:
        done = self.call("scontrol", "update", "partitionname=batch", f"state={state}")
        assert done.returncode == 0, done.stderr

    def _is_of(self, process: psutil.Process, node: str) -> bool:
        spool = str(self.folder / "spool" / node)
        # Another cluster beside this one has nodes of the same names.
        ours = (self.environment["SLURM_CONF"], node)
        try:
            files = [os.readlink(p) for p in Path(f"/proc/{process.pid}/fd").iterdir()]
            children = [c.environ() for c in process.children(recursive=True)]
        except (OSError, psutil.Error):
            return False
        places = [(e.get("SLURM_CONF"), e.get("SLURMD_NODENAME")) for e in children]
        return any(f.startswith(spool) for f in files) or ours in places

    def stop(self) -> None:
        """End every job and daemon; also after a start that failed half way."""
        self._end_jobs()
        found = [
            self._pid(path)
            for path in (*self.folder.glob("run/slurmd-*.pid"), self.folder / "run/slurmctld.pid")
        ]
        daemons = [
            p for p in (*found, self._pid(self.folder / "munge/munged.pid")) if p is not None
        ]
        for daemon in daemons:
            daemon.terminate()
        _, alive = psutil.wait_procs(daemons, timeout=10)
        for daemon in alive:
            daemon.kill()
        self.ports.__exit__(None, None, None)

    def _end_jobs(self) -> None:
        """As far as the controller is there; nothing here may keep the daemons from being ended."""
        deadline = time.monotonic() + _READY_S
        try:
            self.call("scancel", "-u", getpass.getuser())
            while self.call("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        except subprocess.TimeoutExpired:
            return

    def cancel_all(self) -> None:
        """End what a failed test left, and wait until the nodes are free."""
        self.call("scancel", "-u", getpass.getuser())
        self._set_batch("up")
        self.wait_idle()

    def state(self, job: str) -> str:
        out = self.call("squeue", "-h", "-j", job, "-t", "all", "-o", "%T").stdout.split()
        return out[0] if out else "GONE"


def submit(cluster: Cluster, script: Path, options: Sequence[str] = ()) -> str:
    done = cluster.call("sbatch", "--parsable", *options, str(script))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
