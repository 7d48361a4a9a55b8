"""Commits beside the training: nothing is visible before all ranks have written, one at a time, failures end the run.

The learner is a coroutine that answers the real mailbox; it writes what a rank would write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.schema import CheckpointConfig
from opd_megatron.controller import commit
from opd_megatron.controller.committing import Committer
from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.errors import OpdError
from opd_megatron.exchange import mailbox


class Learner:
    """Answers saves; `has_written` is what the ranks' threads would say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has_written = False
        self.fails = False
        self.kinds: list[str] = []

    async def serve(self) -> None:
        while True:
            number = len(self.kinds) + 1
            while (command := mailbox.read_command(self.folder, number)) is None:
                await asyncio.sleep(0.001)
            self.kinds.append(command["kind"])
            if self.fails:
                mailbox.post_failure(self.folder, number, OSError(28, "No space left"), 75)
                continue
            files: int | None = 1
            if command["kind"] in ("save", "begin_save"):
                (Path(command["directory"]) / "weights").write_bytes(b"w")
            if command["kind"] == "finish_save" and not self.has_written:
                files = None
            mailbox.post_answer(self.folder, number, {"files": files})


def play(
    tmp_path: Path,
    async_save: bool,
    story: Callable[[Committer, Learner, list[Any]], Awaitable[None]],
) -> list[Any]:
    """Run a story; what was reported."""
    folder = tmp_path / "mailbox"
    folder.mkdir()

    async def run() -> list[Any]:
        learner, reported = Learner(folder), []
        serving = asyncio.create_task(learner.serve())
        committer = Committer(
            tmp_path / "checkpoints",
            LearnerLink(folder, 10.0),
            {},
            CheckpointConfig(async_save=async_save),
            reported.append,
            lambda seconds: None,
        )
        try:
            await asyncio.wait_for(story(committer, learner, reported), 20)
        finally:
            serving.cancel()
        return reported

    return asyncio.run(run())


def steps(tmp_path: Path) -> list[int]:
    return commit.committed_steps(tmp_path / "checkpoints")


def test_a_commit_becomes_visible_only_when_every_rank_has_written(tmp_path: Path) -> None:
    async def story(committer: Committer, learner: Learner, _: list[Any]) -> None:
        state = {"step": 1}
        await committer.make(1, state)
        await asyncio.sleep(0.3)
        assert steps(tmp_path) == [] and learner.kinds.count("finish_save") > 1
        learner.has_written = True
        await committer.settle()
        assert steps(tmp_path) == [1]

    assert play(tmp_path, True, story) == []


def test_the_next_commit_and_the_end_wait_for_the_one_under_way(tmp_path: Path) -> None:
    async def story(committer: Committer, learner: Learner, _: list[Any]) -> None:
        await committer.make(1, {"step": 1})
        second = asyncio.create_task(committer.make(2, {"step": 2}))
        await asyncio.sleep(0.2)
        assert learner.kinds.count("begin_save") == 1 and not second.done()
        learner.has_written = True
        await second
        assert learner.kinds.count("begin_save") == 2 and steps(tmp_path)[0] == 1
        await committer.settle()
        assert steps(tmp_path) == [1, 2]

    play(tmp_path, True, story)


def test_a_failure_under_way_is_reported_at_once_and_raised_at_the_end(tmp_path: Path) -> None:
    async def story(committer: Committer, learner: Learner, reported: list[Any]) -> None:
        await committer.make(1, {"step": 1})
        learner.fails = True
        while not reported:
            await asyncio.sleep(0.01)
        with pytest.raises(OpdError, match=r"finish_save: OSError.*No space left"):
            await committer.settle()

    (error,) = play(tmp_path, True, story)
    assert isinstance(error, OpdError) and steps(tmp_path) == []


def test_without_async_save_the_commit_is_there_when_the_step_goes_on(tmp_path: Path) -> None:
    async def story(committer: Committer, learner: Learner, _: list[Any]) -> None:
        await committer.make(1, {"step": 1})
        assert steps(tmp_path) == [1] and learner.kinds == ["save"]

    play(tmp_path, False, story)
