"""One process of a run: its command line, what comes before its program, and how its end is told."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd_megatron.lifeline import die_with_parent

TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024
# Of torchrun, and of ours where ranks are forked (megatron/forked_ranks.py), which comes first.
_TORCHRUN_REPORT = re.compile(
    r"torch/distributed/elastic/\S+\] failed \(exitcode|^torchrun: \S+ ended with "
)


@dataclass(frozen=True)
class RoleCommand:
    """One process of a run.

    Args:
        name: e.g. "rollout-0".
        argv: command line; holds no secret.
        environment: added to this process's environment.
        log: file that receives stdout and stderr.
        to_console: stdout goes to the terminal instead (stderr still goes to the log).
        grace_s: how long it may take to end by itself after SIGTERM. 0: SIGKILL at once (stateless servers).
        max_restarts: how often it may be started again after it died; for roles that keep nothing.
    """

    name: str
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    to_console: bool = False
    grace_s: float = 0.0
    max_restarts: int = 0


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented, for an error message; of torchrun, those before it says which rank ended.

    When a rank dies, the other ranks and torchrun write more lines about that than are shown here, and none says why.
    """
    if not path.exists():
        return "  (no log)"
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        text = log.read().decode(errors="replace").splitlines()
    report = next((i for i, line in enumerate(text) if _TORCHRUN_REPORT.search(line)), len(text))
    # The first line of the report says which rank ended, and how.
    shown = text[: report + 1][-lines:]
    return "\n".join(f"  | {line}" for line in shown) or "  (the log is empty)"


def prepare(parent: int, shielded: bool) -> None:
    """In the new process, before its program."""
    die_with_parent(parent)
    if shielded:
        # Blocked, not ignored: programs that install a handler would hear it otherwise.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def describe_exit(code: int) -> str:
    """`exit code 3` or `signal SIGKILL`."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
