"""The plan of a batch: composed losses proven over all sequences of a tree, the same for every cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from enumeration import relative_error
from tree import END, PREFIXES, ROW, SEQUENCES, Tree, declared_gradient, pack, table

from opd_megatron.config.schema import (
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.errors import ContractError
from opd_megatron.losses.batch_metrics import response_positions
from opd_megatron.losses.batch_plan import BatchArrays, StudentScores, TokenPlan, make_plan
from opd_megatron.losses.divergences import DIVERGENCES, make_divergence
from opd_megatron.losses.served_supports import topk_entropy
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import PlannedTokens, TokenInputs, make_token_loss
from opd_megatron.losses.token_stats import TokenStats

NONE = CorrectionConfig(kind="none")
OPEN_SEQUENCE = CorrectionConfig(kind="masked", level="sequence", low=0.0, high=math.inf)


def arrays_of(tree: Tree, rewards_B: torch.Tensor | None = None) -> BatchArrays:
    ids_N = tree.sequences.ids_T
    return BatchArrays(
        behavior_logprobs_N=tree.behavior_T.detach(),
        teacher_logprobs_N=tree.teacher_T.detach(),
        trainable_N=torch.ones_like(ids_N, dtype=torch.bool),
        response_ids_N=ids_N,
        groups_B=torch.zeros(tree.sequences.num_sequences, dtype=torch.long),
        rewards_B=rewards_B,
    )


def scores_of(tree: Tree, settings: LossSettings) -> StudentScores | None:
    if not settings.needs_scores:
        return None
    student_N = tree.student_T.detach()
    return StudentScores(student_N, torch.linspace(0.1, 1.0, len(student_N)).double())


def planned_rows(plan: TokenPlan, rows: slice) -> PlannedTokens:
    def cut(values_N: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_N is None else values_N[rows]

    return PlannedTokens(
        scale_T=plan.scale_N[rows],
        task_T=cut(plan.task_N),
        advantages_T=cut(plan.advantages_N),
        weights_T=cut(plan.weights_N),
        outside_T=cut(plan.outside_N),
        old_logprobs_T=cut(plan.old_logprobs_N),
    )


def loss_sum(
    settings: LossSettings,
    tree: Tree,
    arrays: BatchArrays,
    plan: TokenPlan,
    rows: slice,
    scale_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of one micro-batch, `rows` of the batch; tokens weighted with `scale_N` on top."""
    planned = planned_rows(plan, rows)
    if scale_N is not None:
        planned = replace(planned, scale_T=planned.scale_T.double() * scale_N[rows])
    student_T = tree.student_T[rows]
    stats = TokenStats(student_T, torch.zeros_like(student_T), student_T)
    inputs = TokenInputs(
        arrays.behavior_logprobs_N[rows],
        arrays.teacher_logprobs_N[rows],
        plan.mask_N[rows],
        planned=planned,
    )
    return make_token_loss(settings)(stats, inputs).loss_sum


def expected_gradient(
    settings: LossSettings,
    student: torch.Tensor,
    teacher: torch.Tensor,
    behavior: torch.Tensor,
    rewards_B: torch.Tensor | None = None,
    trainable_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of the composed loss over all sequences, each with its probability under the behavior policy."""
    logits = student.clone().requires_grad_()
    tree = pack(logits, teacher, behavior)
    arrays = arrays_of(tree, rewards_B)
    if trainable_N is not None:
        arrays = replace(arrays, trainable_N=trainable_N)
    plan = make_plan(settings, arrays, scores_of(tree, settings))
    probability_N = tree.probability_B.detach()[tree.sequences.ids_T]
    whole = slice(0, len(probability_N))
    loss_sum(settings, tree, arrays, plan, whole, probability_N).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("discount", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_planned_returns_descend_the_declared_target(name: str, discount: float) -> None:
    objective = ObjectiveConfig(
        divergence=name, discount=discount, jsd_teacher_weight=0.3, alpha=1.4
    )
    divergence = make_divergence(objective)
    student, teacher, other = table(0), table(1), table(2)
    for correction, behavior in ((NONE, student), (OPEN_SEQUENCE, other)):
        settings = LossSettings(objective=objective, correction=correction)
        seen = expected_gradient(settings, student, teacher, behavior)
        wanted = declared_gradient(divergence, discount, student, teacher, student)
        assert relative_error(seen, wanted) <= 1e-10


def expected_reward_gradient(student: torch.Tensor, rewards_B: torch.Tensor) -> torch.Tensor:
    logits = student.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for sequence, reward in zip(SEQUENCES, rewards_B, strict=True):
        steps = [log_p[ROW[sequence[:t]], token] for t, token in enumerate(sequence)]
        total = total + torch.stack(steps).sum().exp() * reward
    total.backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_a_task_term_ascends_the_expected_reward_beside_the_divergence(discount: float) -> None:
    student, teacher = table(0), table(1)
    rewards_B = torch.linspace(-1.0, 2.0, len(SEQUENCES)).double()
    objective = ObjectiveConfig(coefficient=0.5, discount=discount)
    settings = LossSettings(objective=objective, correction=NONE, task=TaskConfig(coefficient=2.0))
    seen = expected_gradient(settings, student, teacher, student, rewards_B)
    divergence = make_divergence(objective)
    wanted = 0.5 * declared_gradient(divergence, discount, student, teacher, student)
    wanted -= 2.0 * expected_reward_gradient(student, rewards_B)
    assert relative_error(seen, wanted) <= 1e-10


@pytest.mark.parametrize("what", ["task", "discount"])
def test_sequence_ratios_see_the_tokens_that_do_not_train(what: str) -> None:
    """The end token is masked; under another behavior policy the expectation is that of on-policy rollouts."""
    student, teacher, other = table(0), table(1), table(2)
    rewards_B = torch.linspace(-1.0, 2.0, len(SEQUENCES)).double()
    task = TaskConfig(coefficient=1.0 if what == "task" else 0.0)
    objective = ObjectiveConfig(discount=1.0 if what == "discount" else 0.0)
    on_policy = LossSettings(objective=objective, correction=NONE, task=task)
    off_policy = replace(on_policy, correction=OPEN_SEQUENCE)
    trainable_N = torch.tensor([token != END for s in SEQUENCES for token in s])
    wanted = expected_gradient(on_policy, student, teacher, student, rewards_B, trainable_N)
    seen = expected_gradient(off_policy, student, teacher, other, rewards_B, trainable_N)
    assert relative_error(seen, wanted) <= 1e-10


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_token_the_teacher_calls_impossible_has_a_finite_return(name: str) -> None:
    objective = ObjectiveConfig(divergence=name, discount=1.0, alpha=2.0)
    settings = LossSettings(objective=objective, correction=NONE)
    tree = pack(table(0), table(1), table(0))
    arrays = arrays_of(tree)
    teacher_N = arrays.teacher_logprobs_N.float().clone()
    teacher_N[5] = -math.inf
    arrays = replace(arrays, teacher_logprobs_N=teacher_N)
    student_N = tree.student_T.detach().float()
    plan = make_plan(settings, arrays, StudentScores(student_N, torch.ones_like(student_N)))
    assert plan.advantages_N is not None
    assert bool(plan.advantages_N.isfinite().all())


def test_without_scores_the_task_term_is_added_to_the_live_advantage() -> None:
    settings = LossSettings(correction=NONE, task=TaskConfig(coefficient=2.0))
    assert not settings.needs_scores
    tree = pack(table(0), table(1), table(0))
    plan = make_plan(settings, arrays_of(tree, torch.ones(len(SEQUENCES))))
    assert plan.advantages_N is None and plan.task_N is not None
    assert torch.equal(plan.task_N, torch.full_like(plan.task_N, 2.0))


COUPLED = {
    "discount": LossSettings(objective=ObjectiveConfig(discount=0.7), correction=OPEN_SEQUENCE),
    "sequence ratios": LossSettings(
        correction=CorrectionConfig(kind="truncated", level="sequence", low=0.5, high=2.0)
    ),
    "geometric mean": LossSettings(
        objective=ObjectiveConfig(allow_biased=True),
        correction=CorrectionConfig(level="geometric_mean", low=0.8, high=1.25),
    ),
    "filter": LossSettings(filter=FilterConfig(score="student_entropy", low=30, high=70)),
    "sequence mean": LossSettings(
        objective=ObjectiveConfig(normalization="sequence_mean", allow_biased=True)
    ),
    "whitened": LossSettings(
        objective=ObjectiveConfig(allow_biased=True),
        whitening=WhiteningConfig(scope="batch", of="sum"),
        task=TaskConfig(coefficient=1.0),
    ),
    "second update": LossSettings(updates_per_step=2),
}


@pytest.mark.parametrize("name", list(COUPLED))
def test_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(name: str) -> None:
    settings = COUPLED[name]
    rewards_B = torch.linspace(0.0, 1.0, len(SEQUENCES))
    results = []
    for cuts in ([0], [0, 1, 7, 20]):
        logits = table(0).requires_grad_()
        tree = pack(logits, table(1), table(2))
        end = len(tree.student_T)
        arrays = arrays_of(tree, rewards_B)
        plan = make_plan(settings, arrays, scores_of(tree, settings))
        borders = [*cuts, end]
        parts = [
            loss_sum(settings, tree, arrays, plan, slice(a, b))
            for a, b in itertools.pairwise(borders)
        ]
        total = torch.stack(parts).sum() / plan.num_kept
        total.backward()
        results.append((total.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_a_filter_keeps_its_share_of_what_the_mask_left() -> None:
    settings = LossSettings(filter=FilterConfig(score="student_entropy", low=70, high=100))
    tree = pack(table(0), table(1), table(2))
    arrays = arrays_of(tree)
    arrays = replace(arrays, trainable_N=torch.arange(len(arrays.trainable_N)) % 2 == 0)
    scores = scores_of(tree, settings)
    assert scores is not None
    plan = make_plan(settings, arrays, scores)
    left = int(arrays.trainable_N.sum())
    assert plan.num_kept == pytest.approx(0.3 * left, abs=1)
    dropped = arrays.trainable_N & ~plan.mask_N
    assert float(scores.entropy_N[plan.mask_N].min()) > float(scores.entropy_N[dropped].max())
    assert not bool((plan.mask_N & ~arrays.trainable_N).any())
    assert plan.metrics["train/filter_kept_frac"] == pytest.approx(plan.num_kept / left)
    masked = 1 - left / len(arrays.trainable_N)
    assert plan.metrics["train/special_masked_frac"] == pytest.approx(masked)


def test_a_sequence_mean_weighs_every_response_the_same() -> None:
    objective = ObjectiveConfig(normalization="sequence_mean", allow_biased=True)
    settings = LossSettings(objective=objective)
    tree = pack(table(0), table(1), table(2))
    plan = make_plan(settings, arrays_of(tree))
    per_response_B = tree.sequences.sum(plan.scale_N) / plan.num_kept
    wanted = torch.full_like(per_response_B, 1 / len(SEQUENCES))
    torch.testing.assert_close(per_response_B, wanted)
    assert float(plan.scale_N.mean()) == pytest.approx(1.0)


def test_whitening_reports_the_moments_it_took_away() -> None:
    settings = COUPLED["whitened"]
    tree = pack(table(0), table(1), table(2))
    arrays = arrays_of(tree, torch.linspace(0.0, 1.0, len(SEQUENCES)))
    plan = make_plan(settings, arrays, scores_of(tree, settings))
    assert plan.advantages_N is not None
    assert float(plan.advantages_N.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(plan.advantages_N.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    raw = make_plan(
        replace(settings, whitening=WhiteningConfig(), updates_per_step=2),
        arrays,
        scores_of(tree, settings),
    ).advantages_N
    assert raw is not None
    assert plan.metrics["train/whitening_mean"] == pytest.approx(float(raw.mean()), abs=1e-6)
    assert plan.metrics["train/whitening_std"] == pytest.approx(
        float(raw.std(correction=0)), abs=1e-6
    )


def test_a_group_relative_task_compares_responses_to_one_prompt() -> None:
    settings = LossSettings(
        task=TaskConfig(coefficient=1.0), whitening=WhiteningConfig(scope="group")
    )
    tree = pack(table(0), table(1), table(2))
    groups_B = torch.arange(len(SEQUENCES)) % 5
    rewards_B = torch.where(groups_B == 0, 1.0, (torch.arange(len(SEQUENCES)) < 8).float())
    arrays = replace(arrays_of(tree, rewards_B), groups_B=groups_B)
    task_N = make_plan(settings, arrays).task_N
    assert task_N is not None
    for group in range(5):
        rows_B = groups_B == group
        first_N = torch.stack([task_N[tree.sequences.ids_T == b][0] for b in rows_B.nonzero()])
        assert float(first_N.mean()) == pytest.approx(0.0, abs=1e-6)
        if group == 0:  # equal rewards say nothing
            assert not first_N.any()


def test_the_second_update_stops_at_the_bounds() -> None:
    settings = COUPLED["second update"]
    tree = pack(table(0), table(1), table(0))
    arrays = arrays_of(tree)
    plan = make_plan(settings, arrays, scores_of(tree, settings))
    moved = tree.student_T.detach() + 0.5  # every ratio is exp(0.5) > 1.2
    moved.requires_grad_()
    stats = TokenStats(moved, torch.zeros_like(moved), moved)
    whole = slice(0, len(moved))
    inputs = TokenInputs(
        arrays.behavior_logprobs_N,
        arrays.teacher_logprobs_N,
        plan.mask_N,
        planned=planned_rows(plan, whole),
    )
    output = make_token_loss(settings)(stats, inputs)
    output.loss_sum.backward()
    assert plan.advantages_N is not None and moved.grad is not None
    pushed_up = plan.advantages_N > 0
    assert torch.equal(output.extras["clipped"].bool(), pushed_up)
    assert not moved.grad[pushed_up].any() and bool((moved.grad[~pushed_up] != 0).all())


def test_a_batch_without_tokens_to_train_on_is_an_ordinary_plan() -> None:
    tree = pack(table(0), table(1), table(2))
    arrays = arrays_of(tree, torch.ones(len(SEQUENCES)))
    arrays = replace(arrays, trainable_N=torch.zeros_like(arrays.trainable_N))
    nothing, no_ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    empty = BatchArrays(nothing, nothing, nothing.bool(), no_ids, no_ids, nothing)
    for settings in COUPLED.values():
        for batch, count in ((arrays, len(arrays.trainable_N)), (empty, 0)):
            scores = StudentScores(torch.zeros(count), torch.zeros(count))
            plan = make_plan(settings, batch, scores if settings.needs_scores else None)
            assert plan.num_kept == 0
            assert bool(torch.isfinite(plan.scale_N).all())


def test_what_the_batch_lacks_is_named() -> None:
    arrays = arrays_of(pack(table(0), table(1), table(2)))
    with pytest.raises(ContractError, match=r"task.coefficient=1.0: the batch carries no rewards"):
        make_plan(LossSettings(task=TaskConfig(coefficient=1.0)), arrays)
    with pytest.raises(ContractError, match="teacher_entropy: the batch carries no teacher top-K"):
        make_plan(LossSettings(filter=FilterConfig(score="teacher_entropy", low=70)), arrays)
    with pytest.raises(ContractError, match="none given"):
        make_plan(COUPLED["discount"], arrays)


def test_positions_restart_with_every_response() -> None:
    ids = torch.tensor([0, 0, 2, 3, 3, 3])
    assert response_positions(ids).tolist() == [0, 1, 0, 0, 1, 2]
    assert len(PREFIXES) == 7


def test_topk_entropy_is_a_lower_bound_and_exact_when_nothing_is_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(20, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = -(logp.exp() * logp).sum(1)
    ordered = logp.sort(dim=1, descending=True).values
    for k in (8, 9):
        torch.testing.assert_close(
            topk_entropy(ordered[:, :k]).double(), exact, rtol=1e-5, atol=1e-6
        )
    bounds = [topk_entropy(ordered[:, :k]).double() for k in range(1, 9)]
    for smaller, larger in itertools.pairwise(bounds):
        assert bool((smaller <= larger + 1e-6).all())
    # What docs/metrics.md says of the distance: the rest can be spread evenly at most.
    for k, bound in enumerate(bounds, start=1):
        rest = 1.0 - ordered[:, :k].exp().sum(1)
        assert bool((exact <= bound + rest * math.log(9 - k) + 1e-6).all())
    certain = torch.tensor([[0.0, -math.inf]])
    assert float(topk_entropy(certain)) == 0.0
