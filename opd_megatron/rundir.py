"""The layout of a run directory. Paths only; who writes what is said beside each.

run.yaml                 the resolved recipe                              launch
environment.json         versions and platform                           launch
metrics.jsonl            one row a step                                   controller
rollouts.jsonl           rollouts shown with coloured tokens              controller
ledger.jsonl             prompt positions of every step                   controller
inputs.json              prompt files: rows used and refused              controller
summary.json report.html the result                                       controller
checkpoints/step_000020/ commits                                          controller + learner
weights/v000020/         published Hugging Face directories, newest few   learner
logs/attempt_1/<role>/   output of every process; logs/latest             launch
attempts/1/              mailbox, step batches, endpoints, keys (0600)    launch, controller
run.lock                 held while the run is alive                      launch
slurm/                   the job: its script, role table, job ids, owner  launch
DONE                     the run reached its end (cluster jobs)           launch
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.errors import ConfigError


def make_folder(path: Path, key: str) -> None:
    """Make a folder and its parents; one that exists is fine.

    Args:
        key: the option that named it, for the message.

    Raises:
        ConfigError: it cannot be made, or not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError.of(
            key, str(path), f"cannot be made: {error.strerror}", "choose another directory"
        ) from error
    if not os.access(path, os.W_OK):
        raise ConfigError.of(key, str(path), "may not be written", "choose another directory")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @property
    def run_yaml(self) -> Path:
        return self.root / "run.yaml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    def published(self) -> list[Path]:
        """Published weights still on disk, oldest first."""
        return sorted(self.weights.glob("v[0-9]*"))

    @property
    def lock(self) -> Path:
        return self.root / "run.lock"

    @property
    def slurm(self) -> SlurmDir:
        return SlurmDir(self.root / "slurm")

    @property
    def done(self) -> Path:
        """Made when the run reached its last step and its report is written: nothing is left to do."""
        return self.root / "DONE"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def role_logs(self, attempt: int, role: str) -> Path:
        return self.logs / f"attempt_{attempt}" / role

    def attempt(self, number: int) -> AttemptDir:
        return AttemptDir(self.root / "attempts" / str(number))

    def attempts(self) -> list[int]:
        """Numbers of all attempts so far, ascending."""
        folder = self.root / "attempts"
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


@dataclass(frozen=True)
class AttemptDir:
    """Files that live as long as one attempt's processes."""

    root: Path

    @property
    def mailbox(self) -> Path:
        return self.root / "mailbox"

    @property
    def batches(self) -> Path:
        return self.root / "batches"

    @property
    def endpoints(self) -> Path:
        return self.root / "endpoints.json"

    @property
    def keys(self) -> Path:
        return self.root / "keys.json"

    @property
    def identity(self) -> Path:
        return self.root / "attempt_id"

    @property
    def heartbeat(self) -> Path:
        """Touched by the controller every second."""
        return self.root / "heartbeat"

    @property
    def serving(self) -> Path:
        """Made by the controller once every role is up and checked: from then on a server that dies is replaced."""
        return self.root / "serving"

    @property
    def finishing(self) -> Path:
        """Made by the controller once all work is committed: the other roles may end from then on."""
        return self.root / "finishing"

    @property
    def number(self) -> int:
        return int(self.root.name)

    @property
    def stop_requested(self) -> Path:
        """Made by whoever hears that the machines will be taken away: the controller commits and ends."""
        return self.root / "stop_requested"

    @property
    def grace(self) -> Path:
        """Seconds of notice that the site gives before it takes the machines (cluster jobs)."""
        return self.root / "grace_s"

    @property
    def grace_s(self) -> float | None:
        """What `grace` says; None where nobody gives notice."""
        return float(self.grace.read_text()) if self.grace.exists() else None

    @property
    def ended(self) -> Path:
        """Holds the attempt's exit code (cluster jobs): every other process of it ends from then on."""
        return self.root / "ended"

    @property
    def nodes(self) -> Path:
        """Where each node of a cluster job says its address and servers: `<role>-<node>.json`."""
        return self.root / "nodes"

    def is_unwanted(self) -> bool:
        """Whether what has not begun yet need not begin: the attempt is over, or was asked to stop."""
        return self.ended.exists() or self.stop_requested.exists()

    def is_newest(self) -> bool:
        """Whether no later attempt has begun. Numbers are given out by an exclusive mkdir, on any file system."""
        return not any(
            int(p.name) > self.number for p in self.root.parent.iterdir() if p.name.isdigit()
        )


@dataclass(frozen=True)
class SlurmDir:
    """What belongs to the job of a run rather than to one attempt."""

    root: Path

    @property
    def script(self) -> Path:
        """The batch script, as submitted."""
        return self.root / "job.sh"

    @property
    def table(self) -> Path:
        """Roles and their places, read by every node."""
        return self.root / "roles.json"

    @property
    def jobs(self) -> Path:
        """Job ids, one a line, oldest first."""
        return self.root / "jobs"

    @property
    def owner(self) -> Path:
        """The id of the job that may begin attempts."""
        return self.root / "owner"

    @property
    def log(self) -> Path:
        """Output of the batch script and of the controller, over all attempts."""
        return self.root / "job.log"

    @property
    def cancelled(self) -> Path:
        """Made by `opd cancel`: jobs of the run end at once, and none follows."""
        return self.root / "cancelled"

    @property
    def bad_nodes(self) -> Path:
        """Names of nodes that failed their check or did not arrive, one a line."""
        return self.root / "bad_nodes"
