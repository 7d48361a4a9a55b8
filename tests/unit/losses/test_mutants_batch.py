"""Mutants around the objective: alignment, numerics, normalisation, filters, returns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from caught import caught
from enumeration import loss_of

from opd_megatron.config.schema import (
    CorrectionConfig,
    ObjectiveConfig,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.losses.batch_plan import BatchArrays, StudentScores, make_plan
from opd_megatron.losses.corrections import importance_weights
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.estimators import policy_gradient, value_as_advantage
from opd_megatron.losses.filters import gather_scores, percentile_window
from opd_megatron.losses.returns import discounted_advantages
from opd_megatron.losses.sequences import Sequences
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.support_matching import support_divergence
from opd_megatron.losses.supports import SupportSources, make_support
from opd_megatron.losses.token_loss import TokenInputs
from opd_megatron.losses.token_stats import TokenStats, token_stats
from opd_megatron.losses.whitening import whiten

V, PADDED = 11, 16
Statistics = Callable[[torch.Tensor, torch.Tensor, float], TokenStats]


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, PADDED, generator=generator, dtype=torch.float64) * 3
    return logits, torch.randint(0, V, (6,), generator=generator)


def our_stats(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> TokenStats:
    return token_stats(logits, targets, vocab_size=V, temperature=temperature)


def dense(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, columns: int = V
) -> TokenStats:
    logp = (logits[:, :columns] / temperature).log_softmax(-1)
    return TokenStats(
        log_z_T=(logits[:, :columns] / temperature).logsumexp(-1),
        entropy_T=-(logp.exp() * logp).sum(-1),
        sampled_logprobs_T=logp.gather(1, targets[:, None])[:, 0],
    )


def check_statistics(statistics: Statistics) -> None:
    logits, targets = logits_and_targets()
    results = []
    for function in (statistics, dense):
        z = logits.clone().requires_grad_()
        stats = function(z, targets, 0.7)
        loss = (stats.sampled_logprobs_T * 1.5 + stats.entropy_T * 0.5).sum()
        (grad,) = torch.autograd.grad(loss, z)
        results.append([stats.log_z_T, stats.entropy_T, stats.sampled_logprobs_T, grad])
    for seen, wanted in zip(*results, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-10)


def padded_columns_counted(z: torch.Tensor, y: torch.Tensor, t: float) -> TokenStats:
    return dense(z, y, t, columns=PADDED)


def temperature_ignored(z: torch.Tensor, y: torch.Tensor, t: float) -> TokenStats:
    return dense(z, y, 1.0)


def entropy_without_gradient(z: torch.Tensor, y: torch.Tensor, t: float) -> TokenStats:
    stats = dense(z, y, t)
    return TokenStats(stats.log_z_T, stats.entropy_T.detach(), stats.sampled_logprobs_T)


def statistics_in_bfloat16(z: torch.Tensor, y: torch.Tensor, t: float) -> TokenStats:
    low = dense(z.bfloat16(), y, t)
    return TokenStats(low.log_z_T.double(), low.entropy_T.double(), low.sampled_logprobs_T.double())


def normalized_by_the_shard(z: torch.Tensor, y: torch.Tensor, t: float) -> TokenStats:
    """The partition function of one shard of two."""
    stats = dense(z, y, t)
    log_z = (z[:, : PADDED // 2] / t).logsumexp(-1)
    return TokenStats(log_z, stats.entropy_T, stats.sampled_logprobs_T + stats.log_z_T - log_z)


@pytest.mark.parametrize(
    "mutant",
    [
        padded_columns_counted,
        temperature_ignored,
        entropy_without_gradient,
        statistics_in_bfloat16,
        normalized_by_the_shard,
    ],
)
def test_mutants_of_the_statistics_are_caught(mutant: Statistics) -> None:
    caught(check_statistics, our_stats, mutant)


def check_self_distillation(teacher_temperature: float) -> None:
    """Student == teacher gives no advantage, at any common temperature."""
    logits, targets = logits_and_targets()
    stats = our_stats(logits, targets, 0.7)
    teacher = dense(logits, targets, teacher_temperature).sampled_logprobs_T
    inputs = TokenInputs(stats.sampled_logprobs_T, teacher, torch.ones(6))
    output = loss_of(ObjectiveConfig(), CorrectionConfig())(stats, inputs)
    assert float(output.advantages_T.abs().max()) < 1e-9


def test_temperature_on_one_side_is_caught() -> None:
    caught(check_self_distillation, 0.7, 1.0)


def check_filter_split(window: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> None:
    scores = torch.arange(20.0)
    whole = window(scores, [20])
    for cuts in ([10, 10], [3, 17]):
        assert torch.equal(window(scores, cuts), whole)


def global_window(scores: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    everything = gather_scores(scores, torch.ones(20, dtype=torch.bool), None)
    return torch.cat(
        [
            percentile_window(part, torch.ones_like(part, dtype=torch.bool), everything, 0, 30)
            for part in scores.split(cuts)
        ]
    )


def window_of_the_micro_batch(scores: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    return torch.cat([part <= part.quantile(0.3) for part in scores.split(cuts)])


def test_a_percentile_of_the_micro_batch_is_caught() -> None:
    caught(check_filter_split, global_window, window_of_the_micro_batch)


def check_signal(total: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """A batch whose tokens all diverge by 2 nats must keep saying so."""
    distillation, task = torch.full((6,), -2.0), torch.tensor([1.0, 0, 1, 0, 1, 0])
    assert float(total(distillation, task).mean()) == pytest.approx(-2.0)


ONE_SET = Sequences(torch.zeros(6, dtype=torch.long), 1)


def task_whitened(distillation: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """The plan's own sum: one response a token, rewards whitened over the batch."""
    settings = LossSettings(
        task=TaskConfig(coefficient=1.0),
        whitening=WhiteningConfig(scope="batch"),
        correction=CorrectionConfig(kind="none"),
        updates_per_step=2,  # the plan computes the whole credit
    )
    ones = torch.ones(6, dtype=torch.bool)
    zeros = torch.zeros(6, dtype=torch.long)
    arrays = BatchArrays(distillation, distillation, ones, torch.arange(6), zeros, task)
    plan = make_plan(settings, arrays, StudentScores(torch.zeros(6), torch.zeros(6)))
    assert plan.advantages_N is not None
    return plan.advantages_N


def test_whitening_after_the_distillation_term_is_caught() -> None:
    caught(check_signal, task_whitened, lambda d, task: whiten(d + task, ONE_SET)[0])


def check_bounds(weigh: Callable[[torch.Tensor], torch.Tensor]) -> None:
    log_ratio = torch.tensor([0.5, 2.0, 0.4, 3.0], dtype=torch.float64).log()
    ratio = log_ratio.exp()
    torch.testing.assert_close(weigh(log_ratio), ratio * torch.tensor([1.0, 1, 0, 0]).double())


BOUNDS = CorrectionConfig(low=math.exp(math.log(0.5)), high=math.exp(math.log(2.0)))


def our_weights(log_ratio: torch.Tensor) -> torch.Tensor:
    return importance_weights(log_ratio, torch.zeros_like(log_ratio), BOUNDS)[0]


@pytest.mark.parametrize(
    "mutant",
    [
        lambda d: d.exp() * ((d.exp() > BOUNDS.low) & (d.exp() < BOUNDS.high)),
        lambda d: d.exp().clamp(BOUNDS.low, BOUNDS.high),
        lambda d: ((d.exp() >= BOUNDS.low) & (d.exp() <= BOUNDS.high)).double(),
    ],
    ids=["exclusive_bounds", "truncated_for_masked", "weight_one_inside"],
)
def test_mutants_of_the_masked_weight_are_caught(
    mutant: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    caught(check_bounds, our_weights, mutant)


def check_certain_tokens(count: Callable[[torch.Tensor, torch.Tensor], int]) -> None:
    """A log-prob of exactly 0 is a token of probability 1, not padding."""
    logprobs, mask = torch.tensor([0.0, -1.0, 0.0, 0.0]), torch.tensor([1, 1, 1, 0]).bool()
    assert count(logprobs, mask) == 3


def our_count(logprobs: torch.Tensor, mask: torch.Tensor) -> int:
    stats = TokenStats(logprobs, logprobs, logprobs)
    loss = loss_of(ObjectiveConfig(), CorrectionConfig())
    return int((loss(stats, TokenInputs(logprobs, logprobs, mask)).weights_T > 0).sum())


def test_zero_logprob_taken_for_padding_is_caught() -> None:
    caught(check_certain_tokens, our_count, lambda x, mask: int(((x != 0) & mask).sum()))


Returns = Callable[[torch.Tensor, Sequences], torch.Tensor]
JSD = make_divergence(ObjectiveConfig(divergence="jsd"))


def check_returns(returns: Returns) -> None:
    """Two sequences of two tokens: the first token of each pays for the second, with f(r) / r."""
    log_r = torch.tensor([0.3, -0.8, 1.1, 0.4], dtype=torch.float64)
    seen = returns(log_r, Sequences(torch.tensor([0, 0, 1, 1]), 2))
    own = -JSD.derivative(log_r)
    cost = JSD.f(log_r) / log_r.exp()
    wanted = own - torch.stack([cost[1], cost[1] * 0, cost[3], cost[3] * 0])
    torch.testing.assert_close(seen, wanted)


def our_returns(log_r: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    own, cost = policy_gradient(JSD)(log_r), -value_as_advantage(JSD)(log_r)
    return discounted_advantages(own, cost, sequences, 1.0)


def summed_derivatives(log_r: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    own = policy_gradient(JSD)(log_r)
    return discounted_advantages(own, -own, sequences, 1.0)


def leaking_across_sequences(log_r: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    return our_returns(log_r, Sequences(torch.zeros_like(sequences.ids_T), 1))


@pytest.mark.parametrize("mutant", [summed_derivatives, leaking_across_sequences])
def test_mutants_of_the_return_are_caught(mutant: Returns) -> None:
    caught(check_returns, our_returns, mutant)


def check_duplicates(support_size: Callable[[torch.Tensor, torch.Tensor], int]) -> None:
    assert support_size(torch.tensor([[4, 2]]), torch.tensor([2])) == 2


def our_size(teacher: torch.Tensor, sampled: torch.Tensor) -> int:
    sources = SupportSources(vocab_size=V, teacher_ids_TK=teacher, sampled_ids_T=sampled)
    return int(make_support("teacher_topk_plus_sampled", sources).valid_TJ.sum())


def test_a_sampled_token_counted_twice_is_caught() -> None:
    caught(check_duplicates, our_size, lambda top, y: torch.cat([top, y[:, None]], dim=1).numel())


def check_missing_entries(
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    value = divergence(student, torch.tensor([[0.0, -math.inf]]))
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert bool(torch.isfinite(grad).all())


def test_infinite_teacher_entries_that_become_nan_are_caught() -> None:
    valid = torch.ones(1, 2, dtype=torch.bool)
    forward_kl = make_divergence(ObjectiveConfig(divergence="forward_kl"))
    caught(
        check_missing_entries,
        lambda s, q: support_divergence(forward_kl, s, q, valid, "raw"),
        lambda s, q: (q.exp() * (q - s) + 0 * s * q).sum(),
    )
