"""When an attempt has nothing left to do, and what stays of a step that was refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.controller.core import Core, CoreSettings
from opd_megatron.controller.ledger import Ledger
from opd_megatron.controller.service import keep_refused


def settings(steps: int) -> CoreSettings:
    return CoreSettings(
        steps=steps, prompts_per_step=4, rollouts_per_prompt=2, evaluate_every=2, save_every=1
    )


def committed(step: int, evaluated_step: int) -> dict[str, object]:
    """The state in a commit."""
    return {
        "step": step,
        "ledger": Ledger().to_state(),
        "bad_steps": 0,
        "evaluated_step": evaluated_step,
    }


@pytest.mark.parametrize(
    ("steps", "step", "evaluated_step", "nothing_left"),
    [(6, 6, 6, True), (6, 5, 4, False), (8, 6, 6, False), (6, 6, 4, False)],
)
def test_only_a_run_with_its_last_commit_and_evaluation_has_nothing_left(
    steps: int, step: int, evaluated_step: int, nothing_left: bool
) -> None:
    assert Core(settings(steps), committed(step, evaluated_step)).nothing_left is nothing_left


def test_a_fresh_run_has_everything_left() -> None:
    assert not Core(settings(1)).nothing_left


def test_every_refused_batch_of_a_step_stays(tmp_path: Path) -> None:
    batch = tmp_path / "step_000003.safetensors"
    for content in ("first", "second"):
        batch.write_text(content)
        assert keep_refused(batch).read_text() == content
    assert not batch.exists()
    assert len(list(tmp_path.iterdir())) == 2
