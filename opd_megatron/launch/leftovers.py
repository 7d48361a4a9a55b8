"""What a killed attempt leaves in the run directory, removed when the next one begins.

    attempts/N/      the mailbox, the endpoints, the keys, the marks and the batches of steps that were under way
    checkpoints/     .step_000020.tmp, a commit that was not finished
    weights/         .v000020.1234.tmp and .v000020.old, a publication that was not finished
    ./ and logs/     .name.1234.tmp, a file that was not renamed into place

Attempt ids, logs and batches of steps that were refused stay. Called while the run's lock is held and after the
processes of every earlier attempt are gone, so nobody is writing any of this.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from opd_megatron.launch.members import remove_scratch
from opd_megatron.rundir import RunDir


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(run: RunDir, number: int) -> None:
    """Remove what attempt `number` no longer needs."""
    attempt = run.attempt(number)
    if attempt.identity.exists():
        remove_scratch(attempt.identity.read_text())
    for path in (
        *(attempt.keys, attempt.endpoints, attempt.heartbeat, attempt.mailbox),
        *(attempt.serving, attempt.grace),
    ):
        _remove(path)
    for pattern in ("step_*", "preflight*", ".*"):
        for path in attempt.batches.glob(pattern):
            _remove(path)


def remove_temporaries(run: RunDir) -> None:
    """Remove files and folders that were being written when a process was killed."""
    for folder, patterns in (
        (run.root, (".*.tmp",)),
        (run.checkpoints, (".step_*.tmp",)),
        (run.weights, (".v*.tmp", ".v*.old")),
        (run.logs, (".latest.*",)),
    ):
        for pattern in patterns:
            for path in folder.glob(pattern):
                _remove(path)
