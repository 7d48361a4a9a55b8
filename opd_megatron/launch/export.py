"""`opd export`: a commit to a Hugging Face directory, by a learner of one rank that loads the weights and publishes.

The rank has no optimizer and no teacher: it needs room for the weights and for their float32 gradient buffers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import glob
import shutil
import tempfile
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from opd_megatron.config.run_yaml import read_run_yaml, write_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.controller import commit
from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.errors import ConfigError
from opd_megatron.launch.roles import learner_role
from opd_megatron.launch.supervisor import POLL_S, Supervisor
from opd_megatron.rundir import RunDir, make_folder

Say = Callable[[str], None]


def export_commit(run: RunDir, out: Path, step: int | None, say: Say) -> None:
    """Write the student of a commit to `out`, which must not exist.

    Args:
        step: which commit; None for the newest that verifies.

    Raises:
        ConfigError: `out` exists, or the run has no commit.
        CheckpointError: the commit does not verify.
        RoleDied: the learner ended, with the end of its log.
        Interrupted: SIGINT, SIGTERM or SIGHUP.
    """
    recipe = read_run_yaml(run.run_yaml)
    if out.exists():
        raise ConfigError.of("--out", str(out), "exists already", "choose a new directory")
    found = _find(run, step, say)
    make_folder(out.parent, "--out")
    try:
        _export(on_one_rank(recipe), found, out)
    finally:
        # Of a rank that was ended while it wrote; the whole directory appears by a rename.
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
            shutil.rmtree(left)
    say(f"wrote {out} from {found.path.name}")


def _export(alone: Recipe, found: commit.Commit, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Supervisor(uuid.uuid4().hex) as supervisor:
        root = Path(folder)
        mailbox, log = root / "mailbox", root / "learner.log"
        mailbox.mkdir()
        write_run_yaml(root / "run.yaml", alone, root, [])
        supervisor.start(learner_role(alone, root / "run.yaml", mailbox, log))
        link = LearnerLink(mailbox, alone.learner.step_timeout_s)
        asyncio.run(_watched(_publish(link, alone.learner.start_timeout_s, found, out), supervisor))


def on_one_rank(recipe: Recipe) -> Recipe:
    """The same recipe for a learner of one rank, which loads a commit of any layout, and without its teachers."""
    single = dataclasses.replace(
        recipe.learner,
        tensor_parallel=1,
        pipeline_parallel=1,
        virtual_pipeline=1,
        context_parallel=1,
        data_parallel=1,
        sequence_parallel=False,
    )
    return dataclasses.replace(recipe, learner=single, teachers={})


def _find(run: RunDir, step: int | None, say: Say) -> commit.Commit:
    if step is not None:
        known = commit.committed_steps(run.checkpoints)
        if step not in known:
            raise ConfigError.of(
                "--step", step, f"this run has commits of steps {known}", "name one"
            )
        return commit.verify(run.checkpoints / f"step_{step:06d}")
    found = commit.newest(run.checkpoints, say)
    if found is None:
        raise ConfigError.of("RUN", str(run.root), "has no commit yet", "wait for checkpoint.every")
    return found


async def _watched(work: Coroutine[Any, Any, None], supervisor: Supervisor) -> None:
    """Do the work as long as the learner lives and nobody interrupts; nothing else would notice either."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            supervisor.check()
            await asyncio.wait({task}, timeout=POLL_S)
    finally:
        task.cancel()
    await task


async def _publish(
    link: LearnerLink, start_timeout_s: float, found: commit.Commit, out: Path
) -> None:
    await link.wait_ready(start_timeout_s, lambda _: None)
    await link.ask("load", source="weights", path=str(found.model))
    await link.ask("publish", directory=str(out), version=found.step, probe_tokens=[])
    await link.ask("stop")
