"""The layout of a run directory. Paths only; who writes what is said beside each.

run.yaml                 the resolved recipe                              launch
environment.json         versions and platform                           launch
metrics.jsonl            one row a step                                   controller
rollouts.jsonl           rollouts shown with coloured tokens              controller
ledger.jsonl             prompt positions of every step                   controller
summary.json report.html the result                                       controller
checkpoints/step_000020/ commits                                          controller + learner
weights/v000020/         published Hugging Face directories, newest few   learner
logs/attempt_1/<role>/   output of every process; logs/latest             launch
attempts/1/              mailbox, step batches, endpoints, keys (0600)    launch, controller
run.lock                 held while the run is alive                      launch
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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

    @property
    def lock(self) -> Path:
        return self.root / "run.lock"

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
