"""Exporting runs a learner of one rank, whatever layout the run had, and ends with it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_megatron.config.rules import problems
from opd_megatron.config.schema import LearnerConfig, Recipe, TeacherConfig
from opd_megatron.errors import RoleDied
from opd_megatron.launch.export import _watched, on_one_rank
from opd_megatron.launch.role_command import RoleCommand
from opd_megatron.launch.supervisor import Interrupted, Supervisor


def test_a_run_in_any_layout_is_exported_by_one_rank() -> None:
    learner = LearnerConfig(
        tensor_parallel=2,
        pipeline_parallel=2,
        virtual_pipeline=2,
        context_parallel=2,
        data_parallel=2,
        sequence_parallel=True,
        distributed_optimizer=True,
    )
    teacher = TeacherConfig(path="teacher", engine="in_process")
    recipe = Recipe(learner=learner, teachers={"main": teacher})
    alone = on_one_rank(recipe)
    assert alone.learner.world_size == 1
    assert [line for line in problems(alone) if line.startswith("learner.")] == []
    assert alone.in_process_teachers == {}, "it would be built, and loaded, for nothing"
    assert alone.student == recipe.student and alone.optimizer == recipe.optimizer


@pytest.fixture
def handlers_of_before() -> Iterator[None]:
    """An interrupted supervisor leaves signals ignored, for its process is about to end."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for_learner(folder: Path, code: str) -> None:
    """As an export that waits for an answer that never comes."""
    with Supervisor(uuid.uuid4().hex) as supervisor:
        supervisor.start(RoleCommand("learner", [sys.executable, "-c", code], folder / "log"))
        asyncio.run(_watched(asyncio.sleep(60), supervisor))


def test_a_learner_that_dies_ends_the_export_with_the_end_of_its_log(tmp_path: Path) -> None:
    code = "import os, signal; print('too large', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    began = time.monotonic()
    with pytest.raises(RoleDied, match=r"(?s)learner ended with signal SIGKILL.*too large"):
        wait_for_learner(tmp_path, code)
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("handlers_of_before")
def test_an_export_can_be_interrupted(tmp_path: Path) -> None:
    code = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(Interrupted):
        wait_for_learner(tmp_path, code)
    assert time.monotonic() - began < 20
