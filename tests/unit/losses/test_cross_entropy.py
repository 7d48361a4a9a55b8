"""Supervised training: on given responses the loss is torch's cross-entropy, and descends KL(data || student)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from enumeration import (
    VOCAB_SIZE,
    expected_gradient,
    random_logprobs,
    relative_error,
    target_gradient,
)

from opd_megatron.config.schema import (
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.errors import ConfigError
from opd_megatron.losses.batch_metrics import step_metrics
from opd_megatron.losses.batch_plan import BatchArrays, TokenPlan, make_plan
from opd_megatron.losses.combinations import check_settings
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import (
    PlannedTokens,
    TokenInputs,
    TokenLossOutput,
    make_token_loss,
)
from opd_megatron.losses.token_stats import TokenStats, token_stats

OBJECTIVE = ObjectiveConfig(divergence="forward_kl", estimator="cross_entropy")
SETTINGS = LossSettings(objective=OBJECTIVE, correction=CorrectionConfig(kind="none"))
LENGTHS = (5, 1, 0, 7, 3)


def test_over_responses_drawn_from_the_data_the_gradient_is_that_of_kl_data_student() -> None:
    student, data = random_logprobs(3), random_logprobs(103)
    loss = make_token_loss(SETTINGS)
    # y ~ data takes the place of the behavior policy; what a teacher says is not read.
    seen = expected_gradient(loss, student, torch.zeros(VOCAB_SIZE).double(), data)
    wanted = target_gradient(lambda p, q: (q.exp() * (q - p)).sum(), student, data)
    assert relative_error(seen, wanted) <= 1e-10


def arrays(num_masked: int = 0) -> BatchArrays:
    total = sum(LENGTHS)
    trainable = torch.ones(total, dtype=torch.bool)
    trainable[torch.randperm(total, generator=torch.Generator().manual_seed(1))[:num_masked]] = (
        False
    )
    return BatchArrays(
        behavior_logprobs_N=torch.zeros(total),
        teacher_logprobs_N=torch.zeros(total),
        trainable_N=trainable,
        response_ids_N=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        groups_B=torch.arange(len(LENGTHS)),
    )


def run(
    settings: LossSettings, batch: BatchArrays, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[TokenLossOutput, TokenStats, TokenPlan]:
    """The composed loss of a planned batch, as one micro-batch."""
    plan = make_plan(settings, batch)
    stats = token_stats(logits, targets, vocab_size=VOCAB_SIZE)
    inputs = TokenInputs(
        batch.behavior_logprobs_N,
        batch.teacher_logprobs_N,
        plan.mask_N,
        planned=PlannedTokens(scale_T=plan.scale_N),
    )
    return make_token_loss(settings)(stats, inputs), stats, plan


@pytest.mark.parametrize("num_masked", [0, 4])
@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
def test_loss_and_gradient_are_those_of_torch_cross_entropy(
    normalization: str, num_masked: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    logits = torch.randn(total, VOCAB_SIZE, generator=generator, dtype=torch.float64) * 2
    targets = torch.randint(VOCAB_SIZE, (total,), generator=generator)
    batch = arrays(num_masked)
    settings = replace(SETTINGS, objective=replace(OBJECTIVE, normalization=normalization))

    ours = logits.clone().requires_grad_()
    made, _, plan = run(settings, batch, ours, targets)
    (made.loss_sum / plan.num_kept).backward()

    theirs = logits.clone().requires_grad_()
    labels = torch.where(batch.trainable_N, targets, -100)
    if normalization == "token_mean":
        wanted = F.cross_entropy(theirs, labels, ignore_index=-100)
    else:
        pieces = zip(theirs.split(LENGTHS), labels.split(LENGTHS), strict=True)
        kept = [(z, y) for z, y in pieces if bool((y >= 0).any())]
        wanted = torch.stack([F.cross_entropy(z, y, ignore_index=-100) for z, y in kept]).mean()
    wanted.backward()
    assert ours.grad is not None and theirs.grad is not None
    # The scale of a token is float32.
    limit = 1e-10 if normalization == "token_mean" else 1e-6
    assert abs((made.loss_sum / plan.num_kept - wanted).item()) <= limit * wanted.item()
    assert relative_error(ours.grad, theirs.grad) <= limit


def test_its_metrics_compare_with_no_teacher_and_no_engine() -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    logits = torch.randn(total, VOCAB_SIZE, generator=generator)
    targets = torch.randint(VOCAB_SIZE, (total,), generator=generator)
    made, stats, plan = run(SETTINGS, arrays(), logits, targets)
    values = {
        "losses": made.losses_T,
        "student_logprobs": stats.sampled_logprobs_T,
        "student_entropy": stats.entropy_T,
    }
    metrics = step_metrics(SETTINGS, arrays(), plan, values)
    wanted = float(F.cross_entropy(logits, targets))
    assert metrics["train/loss"] == pytest.approx(wanted, rel=1e-6)
    assert metrics["train/cross_entropy"] == pytest.approx(wanted, rel=1e-6)
    assert set(metrics) == {
        "train/loss",
        "train/cross_entropy",
        "train/tokens",
        "train/entropy",
        "train/special_masked_frac",
    }
    # Shown in the report: how much more likely the data calls the token than the student does.
    assert torch.equal(made.advantages_T, -stats.sampled_logprobs_T)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objective": replace(OBJECTIVE, divergence="reverse_kl")},
            "objective.divergence=forward_kl",
        ),
        ({"correction": CorrectionConfig()}, "set correction.kind=none"),
        ({"whitening": WhiteningConfig(scope="batch", of="sum")}, "set whitening.scope=none"),
        ({"task": TaskConfig(coefficient=0.5)}, "set task.coefficient=0.0"),
        ({"updates_per_step": 2}, "set batch.updates_per_step=1"),
        ({"filter": FilterConfig(score="kl", low=50)}, "filter.score='kl'"),
        ({"filter": FilterConfig(score="teacher_entropy", low=50)}, "no teacher scores them"),
        ({"objective": replace(OBJECTIVE, discount=0.5)}, "objective.discount=0.5"),
        (
            {"objective": replace(OBJECTIVE, report_overlap=True)},
            "set objective.report_overlap=false",
        ),
    ],
)
def test_what_needs_a_rollout_a_teacher_or_a_reward_is_refused(
    changes: dict[str, Any], words: str
) -> None:
    check_settings(SETTINGS)
    with pytest.raises(ConfigError) as caught:
        check_settings(replace(SETTINGS, **changes))
    assert words in str(caught.value)
    with pytest.raises(ConfigError):
        make_token_loss(replace(SETTINGS, **changes))
