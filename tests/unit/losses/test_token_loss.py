"""The reverse-KL policy gradient: proven by enumeration, reweighted exactly, safe on edges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from enumeration import (
    VOCAB_SIZE,
    expected_gradient,
    loss_of,
    random_logprobs,
    relative_error,
    reverse_kl,
    target_gradient,
)

from opd_megatron.config.schema import CorrectionConfig, ObjectiveConfig
from opd_megatron.errors import ConfigError
from opd_megatron.losses.batch_metrics import step_metrics
from opd_megatron.losses.batch_plan import BatchArrays, make_plan
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.corrections import importance_weights
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import (
    PlannedTokens,
    TokenInputs,
    TokenLossOutput,
    make_token_loss,
)
from opd_megatron.losses.token_stats import TokenStats, token_stats

NO_CORRECTION = CorrectionConfig(kind="none")
SEEDS = range(5)


def batch(num_tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor, TokenInputs]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_tokens, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator)
    noise = torch.randn(2, num_tokens, generator=generator, dtype=torch.float64)
    student = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    mask = torch.rand(num_tokens, generator=generator) < 0.7
    inputs = TokenInputs(student + 0.6 * noise[0], student + noise[1], mask)
    return logits, targets, inputs


def run(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inputs: TokenInputs,
    correction: CorrectionConfig | None = None,
) -> tuple[TokenLossOutput, torch.Tensor]:
    z = logits.clone().requires_grad_()
    loss = loss_of(ObjectiveConfig(), correction or CorrectionConfig())
    output = loss(token_stats(z, targets, vocab_size=VOCAB_SIZE), inputs)
    output.loss_sum.backward()
    assert z.grad is not None
    return output, z.grad


def metrics_of(
    logits: torch.Tensor, targets: torch.Tensor, inputs: TokenInputs, correction: CorrectionConfig
) -> dict[str, float]:
    """Step metrics of one response, as the learner computes them from per-token values."""
    settings = LossSettings(correction=correction)
    stats = token_stats(logits, targets, vocab_size=VOCAB_SIZE)
    output = run(logits, targets, inputs, correction)[0]
    arrays = BatchArrays(
        inputs.behavior_logprobs_T,
        inputs.teacher_logprobs_T,
        inputs.mask_T,
        torch.zeros(len(targets), dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
    )
    values = {
        "student_logprobs": stats.sampled_logprobs_T,
        "student_entropy": stats.entropy_T,
        "losses": output.losses_T,
        "advantages": output.advantages_T,
        "weights": output.weights_T,
        "outside": output.outside_T,
    }
    return step_metrics(settings, arrays, make_plan(settings, arrays), values)


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_gradient_is_the_reverse_kl_gradient(seed: int) -> None:
    student, teacher = random_logprobs(seed), random_logprobs(seed + 100)
    loss = loss_of(ObjectiveConfig(), NO_CORRECTION)
    seen = expected_gradient(loss, student, teacher, behavior_logprobs_V=student)
    assert relative_error(seen, target_gradient(reverse_kl, student, teacher)) <= 1e-10


@pytest.mark.parametrize("kind", ["masked", "truncated"])
@pytest.mark.parametrize("seed", SEEDS)
def test_expected_gradient_under_the_behavior_policy_with_open_bounds(seed: int, kind: str) -> None:
    student, teacher = random_logprobs(seed), random_logprobs(seed + 100)
    behavior = random_logprobs(seed + 200)
    loss = loss_of(ObjectiveConfig(), CorrectionConfig(kind=kind, low=0.0, high=math.inf))
    seen = expected_gradient(loss, student, teacher, behavior)
    assert relative_error(seen, target_gradient(reverse_kl, student, teacher)) <= 1e-10


def test_without_importance_weights_the_behavior_policy_biases_the_gradient() -> None:
    student, teacher, behavior = (random_logprobs(s) for s in (0, 100, 200))
    loss = loss_of(ObjectiveConfig(), NO_CORRECTION)
    seen = expected_gradient(loss, student, teacher, behavior)
    assert relative_error(seen, target_gradient(reverse_kl, student, teacher)) > 0.1


def test_masked_tokens_drop_exactly_their_share_of_the_expected_gradient() -> None:
    student, teacher, behavior = (random_logprobs(s) for s in (0, 100, 200))
    correction = CorrectionConfig(kind="masked", low=0.5, high=2.0)
    ratio = (student - behavior).exp()
    kept = (ratio >= 0.5) & (ratio <= 2.0)
    assert 0 < int(kept.sum()) < VOCAB_SIZE

    def kept_part(logp: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        # Score-function form of the reverse KL, restricted to the kept tokens.
        return (student.exp() * (student - teacher) * logp)[kept].sum()

    seen = expected_gradient(loss_of(ObjectiveConfig(), correction), student, teacher, behavior)
    assert relative_error(seen, target_gradient(kept_part, student, teacher)) <= 1e-10


def test_loss_is_minus_weight_times_advantage_times_logprob() -> None:
    logits, targets, inputs = batch()
    output, grad = run(logits, targets, inputs)
    z = logits.clone().requires_grad_()
    logp = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ratio = (logp - inputs.behavior_logprobs_T).exp().detach()
    weight = ratio * ((ratio >= 0.5) & (ratio <= 2.0)) * inputs.mask_T
    advantage = (inputs.teacher_logprobs_T - logp).detach()
    expected = -(weight * advantage * logp).sum()
    expected.backward()
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(grad, z.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.weights_T, weight)
    torch.testing.assert_close(output.advantages_T, advantage * inputs.mask_T)


def test_bounds_are_inclusive() -> None:
    learner = torch.log(torch.tensor([0.5, 0.499, 1.0, 2.0, 2.001], dtype=torch.float64))
    behavior = torch.zeros(5, dtype=torch.float64)
    bounds: dict[str, Any] = {"low": float(learner[0].exp()), "high": float(learner[3].exp())}
    weights, outside = importance_weights(learner, behavior, CorrectionConfig(**bounds))
    assert outside.tolist() == [False, True, False, False, True]
    assert [round(w, 3) for w in weights.tolist()] == [0.5, 0.0, 1.0, 2.0, 0.0]
    weights, outside = importance_weights(
        learner, behavior, CorrectionConfig(kind="truncated", **bounds)
    )
    assert outside.tolist() == [False, True, False, False, True]
    assert [round(w, 3) for w in weights.tolist()] == [0.5, 0.5, 1.0, 2.0, 2.0]


def test_no_gradient_flows_through_advantages_or_weights() -> None:
    logits, targets, inputs = batch()
    z = logits.clone().requires_grad_()
    output = loss_of(ObjectiveConfig(), CorrectionConfig())(
        token_stats(z, targets, vocab_size=VOCAB_SIZE), inputs
    )
    assert not output.advantages_T.requires_grad and not output.weights_T.requires_grad


def test_identical_student_and_teacher_give_no_gradient() -> None:
    logits, targets, inputs = batch()
    student = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    _, grad = run(logits, targets, replace(inputs, teacher_logprobs_T=student))
    assert float(grad.abs().max()) == pytest.approx(0.0, abs=1e-12)


def test_any_split_into_micro_batches_gives_the_same_sums() -> None:
    logits, targets, inputs = batch()
    whole, grad = run(logits, targets, inputs)
    parts = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = TokenInputs(
            inputs.behavior_logprobs_T[rows], inputs.teacher_logprobs_T[rows], inputs.mask_T[rows]
        )
        parts.append(run(logits[rows], targets[rows], part))
    torch.testing.assert_close(sum(p.loss_sum for p, _ in parts), whole.loss_sum)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), grad)
    for name in ("losses_T", "advantages_T", "weights_T", "outside_T"):
        together = torch.cat([getattr(part, name) for part, _ in parts])
        assert torch.equal(together, getattr(whole, name)), name


def test_masked_positions_may_hold_anything() -> None:
    logits, targets, inputs = batch()
    reference, grad = run(logits, targets, inputs)
    for garbage in (-math.inf, math.inf, 1e30):
        dirty = TokenInputs(
            torch.where(inputs.mask_T, inputs.behavior_logprobs_T, garbage),
            torch.where(inputs.mask_T, inputs.teacher_logprobs_T, garbage),
            inputs.mask_T,
        )
        output, dirty_grad = run(logits, targets, dirty)
        assert torch.equal(output.loss_sum, reference.loss_sum) and torch.equal(dirty_grad, grad)
        for name in ("losses_T", "advantages_T", "weights_T", "outside_T"):
            assert torch.equal(getattr(output, name), getattr(reference, name)), name


def test_a_teacher_that_calls_the_token_impossible_gives_a_bounded_advantage() -> None:
    logits, targets, inputs = batch()
    teacher = torch.full_like(inputs.teacher_logprobs_T, -math.inf)
    output, grad = run(logits, targets, replace(inputs, teacher_logprobs_T=teacher))
    assert bool(torch.isfinite(grad).all())
    assert float(output.advantages_T.abs().max()) == 60.0


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_kept_token_is_an_ordinary_input(num_tokens: int) -> None:
    logits, targets, inputs = batch()
    rows = slice(0, num_tokens)
    empty = TokenInputs(
        inputs.behavior_logprobs_T[rows],
        inputs.teacher_logprobs_T[rows],
        torch.zeros(num_tokens, dtype=torch.bool),
    )
    output, grad = run(logits[rows], targets[rows], empty)
    assert float(output.loss_sum.detach()) == 0.0
    assert not grad.any()
    metrics = metrics_of(logits[rows], targets[rows], empty, CorrectionConfig())
    assert metrics["train/kl_reverse"] == 0.0 and metrics["offpolicy/ppl_drift"] == 1.0


def test_a_float_mask_equals_the_bool_mask() -> None:
    logits, targets, inputs = batch()
    a, grad_a = run(logits, targets, inputs)
    b, grad_b = run(logits, targets, replace(inputs, mask_T=inputs.mask_T.float()))
    assert torch.equal(a.loss_sum, b.loss_sum) and torch.equal(grad_a, grad_b)


def test_metrics_are_means_over_kept_tokens() -> None:
    logits, targets, inputs = batch()
    metrics = metrics_of(logits, targets, inputs, CorrectionConfig())
    kept = inputs.mask_T
    logp = logits.log_softmax(-1)
    student = logp.gather(1, targets[:, None])[:, 0]
    drift = (student - inputs.behavior_logprobs_T)[kept]
    ratio = drift.exp()
    wanted = {
        "train/kl_reverse": (student - inputs.teacher_logprobs_T)[kept].mean(),
        "train/kl_forward": (
            (inputs.teacher_logprobs_T - student).exp() * (inputs.teacher_logprobs_T - student - 1)
            + 1
        )[kept].mean(),
        "train/tokens": kept.sum(),
        "train/log_ratio_at/0-15": (student - inputs.teacher_logprobs_T)[kept].mean(),
        "train/entropy": -(logp.exp() * logp).sum(-1)[kept].mean(),
        "train/advantage_mean": (inputs.teacher_logprobs_T - student)[kept].mean(),
        "train/advantage_abs_max": (inputs.teacher_logprobs_T - student)[kept].abs().max(),
        "offpolicy/logprob_diff_mean": drift.abs().mean(),
        "offpolicy/logprob_diff_max": drift.abs().max(),
        "offpolicy/masked_frac": ((ratio < 0.5) | (ratio > 2.0)).double().mean(),
        "offpolicy/ppl_drift": drift.mean().exp(),
    }
    seen = {name: metrics[name] for name in wanted}
    assert seen == pytest.approx({n: float(x) for n, x in wanted.items()})


def test_each_correction_reports_what_its_bounds_did() -> None:
    logits, targets, inputs = batch()
    fractions = {}
    for kind in ("none", "masked", "truncated"):
        metrics = metrics_of(logits, targets, inputs, CorrectionConfig(kind=kind))
        fractions[kind] = {
            name.removeprefix("offpolicy/"): value
            for name, value in metrics.items()
            if name.startswith("offpolicy/") and name.endswith("ed_frac")
        }
    outside = fractions["masked"]["masked_frac"]
    assert outside > 0
    assert fractions == {
        "none": {"masked_frac": 0.0},
        "masked": {"masked_frac": outside},
        "truncated": {"masked_frac": 0.0, "truncated_frac": outside},
    }


@pytest.mark.parametrize("name", ["behavior_logprobs_T", "teacher_logprobs_T"])
def test_bad_recorded_logprobs_name_the_tensor(name: str) -> None:
    logits, targets, inputs = batch()
    bad = {
        "NaN": torch.full((12,), math.nan, dtype=torch.float64),
        "[11]": torch.zeros(11, dtype=torch.float64),
        "bfloat16": torch.zeros(12, dtype=torch.bfloat16),
    }
    for seen, tensor in bad.items():
        with pytest.raises(LossInputError, match=name) as caught:
            run(logits, targets, replace(inputs, **{name: tensor}))
        assert seen in str(caught.value)


def test_nan_let_through_makes_the_sum_nan() -> None:
    logits, targets, inputs = batch()
    stats: TokenStats = token_stats(logits, targets, vocab_size=VOCAB_SIZE)
    teacher = inputs.teacher_logprobs_T.clone()
    teacher[int(inputs.mask_T.nonzero()[0])] = math.nan
    loss = loss_of(ObjectiveConfig(), CorrectionConfig(), allow_nan=True)
    assert bool(loss(stats, replace(inputs, teacher_logprobs_T=teacher)).loss_sum.isnan())


@pytest.mark.parametrize(
    "correction",
    [CorrectionConfig(low=2.0, high=0.5), CorrectionConfig(low=-1.0), CorrectionConfig(kind="x")],
)
def test_impossible_corrections_are_refused(correction: CorrectionConfig) -> None:
    with pytest.raises(ConfigError, match="correction"):
        loss_of(ObjectiveConfig(), correction)


def test_a_support_estimator_without_a_support_and_short_plans_are_named() -> None:
    stats = TokenStats(torch.zeros(3), torch.zeros(3), torch.zeros(3))
    inputs = TokenInputs(torch.zeros(3), torch.zeros(3), torch.ones(3))
    settings = LossSettings(objective=ObjectiveConfig(estimator="support_matching"))
    with pytest.raises(LossInputError, match=r"inputs\.support: None seen, the teacher"):
        make_token_loss(settings)(stats, inputs)
    for size in (1, 2):
        planned = PlannedTokens(scale_T=torch.ones(3), weights_T=torch.ones(size))
        with pytest.raises(LossInputError, match=rf"planned\.weights_T: shape \[{size}\] seen"):
            make_token_loss()(stats, replace(inputs, planned=planned))
