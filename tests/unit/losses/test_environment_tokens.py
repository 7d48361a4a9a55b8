"""Tokens that an environment wrote change nothing of what the student's own tokens get, whatever stands there."""

from __future__ import annotations

import pytest
import torch

from opd_megatron.config.schema import (
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.losses.batch_plan import BatchArrays, StudentScores, TokenPlan, make_plan
from opd_megatron.losses.settings import LossSettings

SETTINGS = {
    "token weights": LossSettings(),
    "sequence weights": LossSettings(correction=CorrectionConfig(level="sequence", high=50.0)),
    "geometric mean": LossSettings(correction=CorrectionConfig(level="geometric_mean")),
    "returns": LossSettings(objective=ObjectiveConfig(discount=0.9)),
    "filter": LossSettings(filter=FilterConfig(score="kl", low=0.0, high=50.0)),
    "whitened": LossSettings(whitening=WhiteningConfig(scope="batch", of="sum")),
    "task, sequence mean": LossSettings(
        objective=ObjectiveConfig(normalization="sequence_mean"),
        task=TaskConfig(coefficient=1.0),
        whitening=WhiteningConfig(scope="group", of="task"),
    ),
}
# Three responses; True where the environment wrote.
GIVEN = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
RESPONSES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2])


def plan_of(settings: LossSettings, rows: torch.Tensor, seed: int = 0) -> TokenPlan:
    """The plan of the tokens `rows`, with other numbers at the environment's tokens for every seed."""
    numbers = torch.Generator().manual_seed(99)
    student_N, behavior_N, teacher_N, entropy_N = torch.rand(4, len(GIVEN), generator=numbers)
    other = torch.Generator().manual_seed(seed)
    noise_N = torch.rand(len(GIVEN), generator=other) * 30.0
    arrays = BatchArrays(
        behavior_logprobs_N=torch.where(GIVEN, -noise_N, -behavior_N)[rows],
        teacher_logprobs_N=torch.where(GIVEN, -2 * noise_N, -teacher_N)[rows],
        trainable_N=torch.ones(len(rows), dtype=torch.bool),
        response_ids_N=RESPONSES[rows],
        groups_B=torch.tensor([0, 0, 1]),
        rewards_B=torch.tensor([1.0, 0.0, 1.0]),
        sampled_N=~GIVEN[rows],
    )
    settings_scores = StudentScores(-student_N[rows], entropy_N[rows])
    return make_plan(settings, arrays, settings_scores if settings.needs_scores else None)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_students_tokens_get_what_they_get_without_the_environments(name: str) -> None:
    own = (~GIVEN).nonzero()[:, 0]
    alone = plan_of(SETTINGS[name], own)
    for seed in (0, 1):
        whole = plan_of(SETTINGS[name], torch.arange(len(GIVEN)), seed)
        assert not whole.mask_N[GIVEN].any()
        assert whole.metrics == pytest.approx(alone.metrics)
        for field in ("mask_N", "scale_N", "task_N", "advantages_N", "weights_N", "outside_N"):
            mine, theirs = getattr(whole, field), getattr(alone, field)
            assert (mine is None) == (theirs is None), field
            if mine is not None:
                torch.testing.assert_close(mine[own], theirs, msg=field)
