"""Every ensemble's loss and gradient against the full-vocabulary mixture, by enumeration; and mutants of a mean.

An ensemble is a target distribution. So its loss must be the one of a single teacher that holds the mixture: from
sampled tokens in expectation, over a support with all the rest in one bucket, and over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from caught import caught
from enumeration import (
    VOCAB_SIZE,
    expected_gradient,
    loss_of,
    random_logprobs,
    relative_error,
    reverse_kl,
    target_gradient,
)

from opd_megatron.config.schema import (
    CorrectionConfig,
    ObjectiveConfig,
    Recipe,
    TeacherConfig,
    TeachingConfig,
)
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.fused.dense import dense_stats
from opd_megatron.losses.mixtures import mixed_logits
from opd_megatron.losses.served_supports import served_support
from opd_megatron.losses.teacher_logits import LocalLogits
from opd_megatron.losses.token_loss import TokenInputs
from opd_megatron.losses.token_stats import token_stats
from opd_megatron.teacher.choice import target_of
from opd_megatron.teacher.joint import Listing, candidates, join
from opd_megatron.teacher.target import Target
from opd_megatron.types import Prompt

V = VOCAB_SIZE
NAMES = ("a", "b", "c")
TEACHERS = {name: random_logprobs(10 + i) for i, name in enumerate("abcdefgh")}
UNEQUAL = {name: 1.0 + i for i, name in enumerate(TEACHERS)}
STUDENT = random_logprobs(3)
OPEN = CorrectionConfig(kind="none")
# Every kind of teaching, and the mixture that it is at the step of the test, written out.
KINDS: dict[str, tuple[TeachingConfig, dict[str, float], str]] = {
    "arithmetic_mean": (
        TeachingConfig(kind="arithmetic_mean", weights={"a": 1.0, "b": 2.0, "c": 1.0}),
        {"a": 0.25, "b": 0.5, "c": 0.25},
        "arithmetic",
    ),
    "geometric_mean": (
        TeachingConfig(kind="geometric_mean", weights={"a": 0.7, "c": 0.3}),
        {"a": 0.7, "c": 0.3},
        "geometric",
    ),
    "eight_arithmetic": (
        TeachingConfig(kind="arithmetic_mean", weights=UNEQUAL),
        {name: w / 36.0 for name, w in UNEQUAL.items()},
        "arithmetic",
    ),
    "eight_geometric": (
        TeachingConfig(kind="geometric_mean", weights=UNEQUAL),
        {name: w / 36.0 for name, w in UNEQUAL.items()},
        "geometric",
    ),
    "hard_switch": (TeachingConfig(kind="hard_switch"), {"b": 1.0}, "arithmetic"),
    "soft_switch": (
        TeachingConfig(kind="soft_switch", starts={"c": 0.0, "a": 0.8}),
        {"c": 0.5, "a": 0.5},
        "arithmetic",
    ),
    "soft_switch_geometric": (
        TeachingConfig(kind="soft_switch", mean="geometric_mean", starts={"b": 0.2, "c": 0.0}),
        {"b": 1.0},
        "geometric",
    ),
}
STEP, STEPS = 40, 100


def written_out(weights: dict[str, float], mean: str) -> torch.Tensor:
    """[V] log-probs of the mixture, from probabilities."""
    if mean == "arithmetic":
        q = sum((w * TEACHERS[name].exp() for name, w in weights.items()), torch.zeros(V))
    else:
        q = torch.ones(V, dtype=torch.float64)
        for name, w in weights.items():
            q = q * TEACHERS[name].exp() ** w
    return (q / q.sum()).log()


def target_for(config: TeachingConfig) -> Target:
    teachers = {name: TeacherConfig(path=name) for name in config.weights or NAMES}
    recipe = Recipe(steps=STEPS, teachers=teachers, teaching=config)
    return target_of(recipe, Prompt("p", (1,), "", None, None, ""), 0, STEP)


def inside(target: Target, rows: int = 1) -> torch.Tensor:
    """[rows, V] logits of the target, as teachers inside the learner make them: any shift a row."""
    shifts = {name: 3.0 * i for i, name in enumerate(TEACHERS)}
    logits = [(TEACHERS[name] + shifts[name]).repeat(rows, 1) for name in target.members]
    if not target.mean:
        return logits[0]
    log_z = [one.logsumexp(1) for one in logits]
    return mixed_logits(target.mean, [w for _, w in target.weights], logits, log_z)


def served(target: Target, token: int, k: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The sampled token's log-prob, ids [1, k] and log-probs [1, k] of the target, as servers make them."""
    listings = []
    for name in target.members:
        best = TEACHERS[name].topk(V)
        sampled = TEACHERS[name][token : token + 1].numpy()
        listings.append(Listing(sampled, best.indices[None].numpy(), best.values[None].numpy()))
    ids = candidates(listings, None)
    joint = join(target, listings, ids, [None] * len(listings), support="teacher_topk", topk=k)
    return (
        float(joint.sampled_L[0]),
        torch.from_numpy(joint.ids_LJ),
        torch.from_numpy(joint.logprobs_LJ),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_asks_whom_it_says_and_both_engines_give_the_mixture(kind: str) -> None:
    config, weights, mean = KINDS[kind]
    target = target_for(config)
    assert dict(target.weights) == pytest.approx(weights)
    wanted = written_out(weights, mean)
    torch.testing.assert_close(inside(target).log_softmax(1)[0], wanted)
    for token in range(V):
        sampled, ids, logprobs = served(target, token, V)
        assert sampled == pytest.approx(float(wanted[token]), abs=1e-9)
        torch.testing.assert_close(logprobs[0], wanted[ids[0]], atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_from_sampled_tokens_the_expected_gradient_is_that_of_the_mixture(kind: str) -> None:
    config, weights, mean = KINDS[kind]
    target = target_for(config)
    seen = torch.tensor([served(target, token, V)[0] for token in range(V)], dtype=torch.float64)
    gradient = expected_gradient(loss_of(ObjectiveConfig(), OPEN), STUDENT, seen, STUDENT)
    wanted = target_gradient(reverse_kl, STUDENT, written_out(weights, mean))
    assert relative_error(gradient, wanted) < 1e-10


def test_an_unknown_normaliser_is_a_baseline_of_the_sampled_reverse_kl() -> None:
    target = Target.of("geometric_mean", {"a": 0.5, "b": 0.5})
    off = (
        torch.tensor([served(target, token, V)[0] for token in range(V)], dtype=torch.float64) - 0.3
    )
    gradient = expected_gradient(loss_of(ObjectiveConfig(), OPEN), STUDENT, off, STUDENT)
    wanted = target_gradient(reverse_kl, STUDENT, written_out({"a": 0.5, "b": 0.5}, "geometric"))
    assert relative_error(gradient, wanted) < 1e-10


def _bucketed(name: str, log_p: torch.Tensor, log_q: torch.Tensor, k: int) -> torch.Tensor:
    """D on the target's top-k and one entry for the rest, in textbook form."""
    ids = log_q.topk(k).indices
    p, q = log_p[ids].exp(), log_q[ids].exp()
    p, q = (torch.cat([x, 1.0 - x.sum()[None]]) for x in (p, q))
    return (p * (p / q).log()).sum() if name == "reverse_kl" else (q * (q / p).log()).sum()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_support_loss_and_gradient_are_those_of_the_mixture(
    kind: str, divergence: str
) -> None:
    config, weights, mean = KINDS[kind]
    target, k = target_for(config), 3
    objective = ObjectiveConfig(
        divergence=divergence, estimator="support_matching", support="teacher_topk", topk=k
    )
    sampled, ids, logprobs = served(target, 1, k)
    support, inputs = served_support(
        "teacher_topk",
        vocab_size=V,
        topk_ids_TK=ids,
        topk_logprobs_TK=logprobs,
        sampled_ids_T=torch.tensor([1]),
        sampled_logprobs_T=torch.tensor([sampled], dtype=torch.float64),
    )
    logits = STUDENT.clone().requires_grad_()
    stats = token_stats(
        logits[None], torch.tensor([1]), support_ids_TJ=support.ids_TJ, vocab_size=V
    )
    one = torch.zeros(1, dtype=torch.float64)
    made = loss_of(objective, OPEN)(stats, TokenInputs(one, one, torch.ones(1), support=inputs))
    made.loss_sum.backward()
    reference = STUDENT.clone().requires_grad_()
    log_p = reference.log_softmax(0)
    wanted = _bucketed(divergence, log_p, written_out(weights, mean), k)
    wanted.backward()
    torch.testing.assert_close(made.loss_sum.detach(), wanted.detach(), atol=1e-9, rtol=1e-9)
    assert logits.grad is not None and reference.grad is not None
    assert relative_error(logits.grad, reference.grad) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_whole_vocabulary_loss_and_gradient_are_those_of_the_mixture(kind: str) -> None:
    config, weights, mean = KINDS[kind]
    divergence = make_divergence(ObjectiveConfig(divergence="reverse_kl"))
    logits = STUDENT.clone().requires_grad_()
    teacher = inside(target_for(config))
    stats = dense_stats(logits[None], teacher, torch.tensor([0]), divergence, vocab_size=V)
    stats.divergence_T.sum().backward()
    reference = target_gradient(reverse_kl, STUDENT, written_out(weights, mean))
    assert logits.grad is not None
    assert relative_error(logits.grad, reference) < 1e-9


Mix = Callable[[str, Sequence[float], Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]


def _swapped(mean: str, *rest: Sequence) -> torch.Tensor:
    other = {"arithmetic_mean": "geometric_mean", "geometric_mean": "arithmetic_mean"}
    return mixed_logits(other[mean], *rest)


def _reversed_weights(mean: str, weights: Sequence[float], *rest: Sequence) -> torch.Tensor:
    return mixed_logits(mean, list(reversed(weights)), *rest)


def _mean_of_logits(
    mean: str, weights: Sequence[float], logits: Sequence, log_z: Sequence
) -> torch.Tensor:
    """Averages probabilities that were never normalised."""
    if mean == "geometric_mean":
        return mixed_logits(mean, weights, logits, log_z)
    return mixed_logits(mean, weights, logits, [torch.zeros_like(one) for one in log_z])


def _equal_weights(mean: str, weights: Sequence[float], *rest: Sequence) -> torch.Tensor:
    return mixed_logits(mean, [1.0 / len(weights)] * len(weights), *rest)


@pytest.mark.parametrize("mutant", [_swapped, _reversed_weights, _mean_of_logits, _equal_weights])
def test_mutants_of_a_mean_are_caught(mutant: Mix) -> None:
    def check(mix: Mix) -> None:
        for mean in ("arithmetic_mean", "geometric_mean"):
            logits = [TEACHERS[name][None] + 3.0 * i for i, name in enumerate("abc")]
            log_z = [one.logsumexp(1) for one in logits]
            seen = mix(mean, [0.6, 0.3, 0.1], logits, log_z).log_softmax(1)[0]
            wanted = written_out({"a": 0.6, "b": 0.3, "c": 0.1}, mean.removesuffix("_mean"))
            assert relative_error(seen, wanted) < 1e-9

    caught(check, mixed_logits, mutant)


def test_a_mean_of_one_teacher_with_itself_is_that_teacher() -> None:
    logits = [TEACHERS["a"][None], TEACHERS["a"][None] - 2.0]
    for mean in ("arithmetic_mean", "geometric_mean"):
        mixed = mixed_logits(mean, [0.3, 0.7], logits, [one.logsumexp(1) for one in logits])
        torch.testing.assert_close(mixed.log_softmax(1)[0], TEACHERS["a"])


def test_padding_of_the_vocabulary_does_not_count() -> None:
    logits = [torch.cat([TEACHERS[n], torch.full((2,), 50.0)])[None] for n in "ab"]
    log_z = [LocalLogits(one, V).log_z() for one in logits]
    mixed = LocalLogits(mixed_logits("arithmetic_mean", [0.5, 0.5], logits, log_z), V)
    ids = torch.arange(V)[None]
    seen = mixed.stats(torch.tensor([0]), ids).support_logprobs_TJ
    assert seen is not None
    wanted = written_out({"a": 0.5, "b": 0.5}, "arithmetic")
    torch.testing.assert_close(seen[0].double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", [[0.5, 0.4], [1.0, 0.0], [0.5, 0.5, 0.0], []])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    logits = [TEACHERS[name][None] for name in "ab"]
    with pytest.raises(LossInputError):
        mixed_logits("arithmetic_mean", weights, logits, [one.logsumexp(1) for one in logits])


def test_a_mean_in_float32_stays_within_rounding() -> None:
    generator = np.random.default_rng(0)
    logits = [torch.from_numpy(generator.normal(size=(64, 500)) * 4).float() for _ in range(4)]
    log_z = [one.double().logsumexp(1).float() for one in logits]
    mixed = mixed_logits("arithmetic_mean", [0.25] * 4, logits, log_z).double().log_softmax(1)
    wanted = sum(0.25 * one.double().softmax(1) for one in logits)
    assert isinstance(wanted, torch.Tensor)
    assert float((mixed - wanted.log()).abs().max()) < 1e-4
