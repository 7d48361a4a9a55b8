"""What the learner answers reaches the controller as the right error; nobody waits for a learner that failed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.errors import CheckpointError, ConfigError, OpdError, RoleDied
from opd_megatron.exchange import mailbox


def test_a_rank_that_fails_before_it_is_ready_ends_the_wait_with_its_own_words(
    tmp_path: Path,
) -> None:
    mailbox.post_failure(tmp_path, 1, ConfigError("bf16 needs a GPU"), 78)
    link = LearnerLink(tmp_path, 5.0)
    with pytest.raises(ConfigError, match="learner, start: ConfigError: bf16 needs a GPU"):
        asyncio.run(link.wait_ready(60.0, lambda waited: None))


@pytest.mark.parametrize(("error", "code"), [(CheckpointError("damaged"), 78), (OSError("x"), 1)])
def test_a_failure_keeps_its_exit_code(tmp_path: Path, error: Exception, code: int) -> None:
    mailbox.post_failure(tmp_path, 1, error, code)
    with pytest.raises(OpdError, match=f"learner, load: {type(error).__name__}") as raised:
        asyncio.run(LearnerLink(tmp_path, 5.0).ask("load"))
    assert raised.value.exit_code == (78 if code == 78 else 75)


def test_a_learner_that_does_not_answer_is_named_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(RoleDied, match=r"learner: no answer to 'train' after 0 s"):
        asyncio.run(LearnerLink(tmp_path, 0.1).ask("train"))


def test_stop_is_the_next_command_and_nobody_waits_for_it(tmp_path: Path) -> None:
    link = LearnerLink(tmp_path, 5.0)
    mailbox.post_answer(tmp_path, 1, {})
    asyncio.run(link.ask("save"))
    link.tell_to_stop()
    command = mailbox.read_command(tmp_path, 2)
    assert command is not None and command["kind"] == "stop"
