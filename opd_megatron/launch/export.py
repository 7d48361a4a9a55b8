"""`opd export`: a commit to a Hugging Face directory, by a learner of one rank that loads it and publishes."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from opd_megatron.config.run_yaml import read_run_yaml, write_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.controller import commit
from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.errors import ConfigError, RoleDied
from opd_megatron.launch.roles import learner_role
from opd_megatron.launch.supervisor import Supervisor, tail
from opd_megatron.rundir import RunDir, make_folder

Say = Callable[[str], None]


def export_commit(run: RunDir, out: Path, step: int | None, say: Say) -> None:
    """Write the student of a commit to `out`, which must not exist.

    Args:
        step: which commit; None for the newest that verifies.

    Raises:
        ConfigError: `out` exists, or the run has no commit.
        CheckpointError: the commit does not verify.
    """
    recipe = read_run_yaml(run.run_yaml)
    if out.exists():
        raise ConfigError.of("--out", str(out), "exists already", "choose a new directory")
    found = _find(run, step, say)
    make_folder(out.parent, "--out")
    alone = on_one_rank(recipe)
    with tempfile.TemporaryDirectory() as folder, Supervisor(uuid.uuid4().hex) as supervisor:
        root = Path(folder)
        mailbox, log = root / "mailbox", root / "learner.log"
        mailbox.mkdir()
        write_run_yaml(root / "run.yaml", alone, root, [])
        supervisor.start(learner_role(alone, root / "run.yaml", mailbox, log))
        try:
            asyncio.run(_publish(LearnerLink(mailbox, alone.learner.step_timeout_s), found, out))
        except RoleDied as error:
            raise RoleDied(f"{error}\n{tail(log)}") from error
    say(f"wrote {out} from {found.path.name}")


def on_one_rank(recipe: Recipe) -> Recipe:
    """The same recipe for a learner of one rank, which loads a commit of any layout."""
    single = dataclasses.replace(
        recipe.learner,
        tensor_parallel=1,
        pipeline_parallel=1,
        virtual_pipeline=1,
        context_parallel=1,
        data_parallel=1,
        sequence_parallel=False,
    )
    return dataclasses.replace(recipe, learner=single)


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


async def _publish(link: LearnerLink, found: commit.Commit, out: Path) -> None:
    await link.wait_ready(120.0, lambda _: None)
    await link.ask("load", source="commit", path=str(found.model))
    await link.ask("publish", directory=str(out), version=found.step, probe_tokens=[])
    await link.ask("stop")
