"""Making commits: the learner's part and the controller's, one after the other or beside the training.

    checkpoint.async_save=false   begin -> learner: save -> finish                     then the next step
    checkpoint.async_save=true    begin -> learner: begin_save (copied)                then the next step
                                  meanwhile: finish_save until every rank wrote -> finish

Either way `commit.finish` renames only what all ranks made durable. A commit that is still under way is finished
before the next one begins and before the run ends; a kill leaves its temporary folder, which the next try removes.
The state of the controller that goes into a commit is taken when it begins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_megatron.config.schema import CheckpointConfig
from opd_megatron.controller import commit
from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.errors import RoleDied

# Between two questions whether all ranks have written; a question takes the learner milliseconds between steps.
_ASK_AGAIN_S = 0.1


class Committer:
    """Commits of one attempt.

    Args:
        root: the run's checkpoints.
        learner: who writes the model.
        fingerprint: what identifies the run.
        config: how many commits stay, and whether they are made beside the training.
        report: told at once when a commit under way fails; `settle` and the next `make` raise it too.
        measured: told how many seconds each commit took, from its beginning until a resume may start from it.
    """

    def __init__(
        self,
        root: Path,
        learner: LearnerLink,
        fingerprint: dict[str, Any],
        config: CheckpointConfig,
        report: Callable[[BaseException], None],
        measured: Callable[[float], None],
    ) -> None:
        self._root = root
        self._learner = learner
        self._fingerprint = fingerprint
        self._config = config
        self._report = report
        self._measured = measured
        self._under_way: asyncio.Task[None] | None = None

    async def make(self, step: int, state: dict[str, Any]) -> None:
        """Commit `step`; with async_save, return as soon as the learner may go on.

        Raises:
            OpdError: the learner failed, at this commit or the one before.
        """
        await self.settle()
        begin = time.monotonic()
        temporary = await asyncio.to_thread(commit.begin, self._root, step)
        directory = str(temporary / commit.MODEL)
        if not self._config.async_save:
            await self._learner.ask("save", directory=directory)
            await self._finish(step, state, begin)
            return
        await self._learner.ask("begin_save", directory=directory)
        self._under_way = asyncio.create_task(self._complete(step, state, begin), name="commit")
        self._under_way.add_done_callback(self._tell)

    async def settle(self) -> None:
        """Wait for the commit that is under way, if there is one."""
        if self._under_way is not None:
            await self._under_way
            self._under_way = None

    def cancel(self) -> None:
        """The run ends early: what is not committed yet will not be."""
        if self._under_way is not None:
            self._under_way.cancel()

    async def _complete(self, step: int, state: dict[str, Any], begin: float) -> None:
        limit_s = self._learner.timeout_s
        while (await self._learner.ask("finish_save"))["files"] is None:
            if time.monotonic() - begin > limit_s:
                raise RoleDied(
                    f"learner: the commit of step {step} is not written after {limit_s:.0f} s "
                    f"(learner.step_timeout_s); a rank or its file system hangs"
                )
            await asyncio.sleep(_ASK_AGAIN_S)
        await self._finish(step, state, begin)

    async def _finish(self, step: int, state: dict[str, Any], begin: float) -> None:
        await asyncio.to_thread(
            commit.finish, self._root, step, state, self._fingerprint, self._config.keep
        )
        self._measured(time.monotonic() - begin)

    def _tell(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._report(error)
