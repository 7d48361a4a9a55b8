"""Which source a job runs: the commit, or a refusal when the checkout differs from it.

The job runs the package that is installed at the site (a shared checkout or the container), not a copy. A commit alone
therefore says what ran only while nobody edits; a dirty tree is refused, or its difference is kept beside the job.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from opd_megatron import __version__
from opd_megatron.atomic import write_json
from opd_megatron.errors import ConfigError
from opd_megatron.observe.environment import git_state
from opd_megatron.rundir import RunDir

_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


def check_source(allow_dirty: bool, root: Path = _PACKAGE_ROOT) -> dict[str, Any]:
    """Version, and the state of the checkout if the package runs from one.

    Raises:
        ConfigError: the checkout is dirty and `allow_dirty` was not said.
    """
    git = git_state(root)
    if git is not None and git["dirty"] and not allow_dirty:
        raise ConfigError.of(
            "source",
            str(root),
            f"differs from its commit {git['commit'][:12]}",
            "commit, or say --allow-dirty, which keeps the difference in the run directory",
        )
    return {"opd_megatron": __version__, "git": git}


def record_source(run: RunDir, source: dict[str, Any], root: Path = _PACKAGE_ROOT) -> None:
    """Write source.json and, for a dirty tree, source.diff, which `git apply` puts back: new files are in it."""
    write_json(run.slurm.root / "source.json", source)
    if source["git"] is None or not source["git"]["dirty"]:
        return
    git = ["git", "--no-optional-locks", "-C", str(root)]
    index = run.slurm.root / ".git-index"
    # A diff knows files of an index only; the checkout's own index stays as it is.
    environment = {**os.environ, "GIT_INDEX_FILE": str(index)}
    with (run.slurm.root / "source.diff").open("wb") as file:
        for arguments in (["read-tree", "HEAD"], ["add", "-N", "."], ["diff", "HEAD", "--binary"]):
            command = [*git, *arguments]
            subprocess.run(command, stdout=file, env=environment, timeout=60, check=True)
    index.unlink()
