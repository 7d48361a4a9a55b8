"""Support matching against dense formulas: every divergence, support, normalisation, weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from enumeration import VOCAB_SIZE, relative_error

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.divergences import DIVERGENCES, make_divergence
from opd_megatron.losses.support_matching import (
    NORMALIZATIONS,
    TOKEN_WEIGHTS,
    support_divergence,
    support_masses,
    surrogate,
)
from opd_megatron.losses.supports import SUPPORTS, Support, SupportSources, make_support
from opd_megatron.losses.token_stats import token_stats

T, K = 5, 3
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
F = {  # f(p / q) times q, as textbooks write it
    "reverse_kl": lambda p, q: p * (p / q).log(),
    "forward_kl": lambda p, q: q * (q / p).log(),
    "jsd": lambda p, q: (
        0.3 * q * (q / (0.3 * q + 0.7 * p)).log() + 0.7 * p * (p / (0.3 * q + 0.7 * p)).log()
    ),
    "squared_hellinger": lambda p, q: 0.5 * (p.sqrt() - q.sqrt()) ** 2,
    "alpha": lambda p, q: (p**1.4 * q**-0.4 - 1.4 * p + 0.4 * q) / (1.4 * 0.4),
    "tsallis": lambda p, q: (p**1.4 * q**-0.4 - 1.4 * p + 0.4 * q) / 0.4,
    "chi2": lambda p, q: (p - q) ** 2 / q,
    "total_variation": lambda p, q: 0.5 * (p - q).abs(),
}
SLOPE = {"reverse_kl": 1.0, "forward_kl": -1.0}


def models() -> tuple[torch.Tensor, torch.Tensor, SupportSources]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, T, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    teacher = teacher.log_softmax(-1)
    sampled = torch.randint(0, VOCAB_SIZE, (T,), generator=generator)
    sources = SupportSources(
        vocab_size=VOCAB_SIZE,
        teacher_ids_TK=teacher.topk(K, dim=1).indices,
        student_ids_TK=student.topk(K, dim=1).indices,
        sampled_ids_T=sampled,
    )
    return student, teacher, sources


def through_token_stats(
    loss: Loss, student: torch.Tensor, teacher: torch.Tensor, support: Support
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = student.clone().requires_grad_()
    targets = torch.zeros(len(student), dtype=torch.long)
    stats = token_stats(logits, targets, support_ids_TJ=support.ids_TJ, vocab_size=VOCAB_SIZE)
    assert stats.support_logprobs_TJ is not None
    loss_T = loss(stats.support_logprobs_TJ, teacher.gather(1, support.ids_TJ), support.valid_TJ)
    loss_T.sum().backward()
    assert logits.grad is not None
    return loss_T.detach(), logits.grad


def on_support(logp: torch.Tensor, support: Support, normalization: str) -> list[torch.Tensor]:
    """Per row: the measure on its valid ids, as plain probabilities."""
    rows = []
    for row, ids, valid in zip(logp, support.ids_TJ, support.valid_TJ, strict=True):
        p = row[ids[valid]].exp()
        if normalization == "renormalized" and len(p):
            p = p / p.sum()
        if normalization == "tail_bucket" and len(p) < VOCAB_SIZE:
            p = torch.cat([p, 1 - p.sum()[None]])
        rows.append(p)
    return rows


def dense(
    name: str, student: torch.Tensor, teacher: torch.Tensor, support: Support, normalization: str
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = student.clone().requires_grad_()
    rows = zip(
        on_support(logits.log_softmax(-1), support, normalization),
        on_support(teacher, support, normalization),
        strict=True,
    )
    slope = SLOPE.get(name, 0.0) if normalization == "generalized" else 0.0
    values = torch.stack([(F[name](p, q) - slope * (p - q)).sum() for p, q in rows])
    values.sum().backward()
    assert logits.grad is not None
    return values.detach(), logits.grad


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", list(SUPPORTS))
@pytest.mark.parametrize("divergence_name", list(DIVERGENCES))
def test_value_and_gradient_are_those_of_the_declared_divergence(
    divergence_name: str, name: str, normalization: str
) -> None:
    student, teacher, sources = models()
    support = make_support(name, sources)
    divergence = make_divergence(
        ObjectiveConfig(divergence=divergence_name, jsd_teacher_weight=0.3, alpha=1.4)
    )
    value, grad = through_token_stats(
        lambda s, q, v: support_divergence(divergence, s, q, v, normalization),
        student,
        teacher,
        support,
    )
    wanted_value, wanted_grad = dense(divergence_name, student, teacher, support, normalization)
    torch.testing.assert_close(value, wanted_value, rtol=1e-10, atol=1e-11)
    assert float((grad - wanted_grad).norm()) <= 1e-10 * max(1.0, float(wanted_grad.norm()))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("divergence_name", list(DIVERGENCES))
def test_on_the_full_vocabulary_it_is_the_whole_divergence(
    divergence_name: str, normalization: str
) -> None:
    student, teacher, sources = models()
    divergence = make_divergence(
        ObjectiveConfig(divergence=divergence_name, jsd_teacher_weight=0.3, alpha=1.4)
    )
    logits = student.clone().requires_grad_()
    divergence.terms(logits.log_softmax(-1), teacher).sum().backward()
    _, grad = through_token_stats(
        lambda s, q, v: support_divergence(divergence, s, q, v, normalization),
        student,
        teacher,
        make_support("full", sources),
    )
    assert logits.grad is not None
    assert relative_error(grad, logits.grad) <= 1e-9


@pytest.mark.parametrize("normalization", ["renormalized", "raw"])
@pytest.mark.parametrize("token_weights", TOKEN_WEIGHTS)
def test_surrogate_gradient_is_that_of_its_declared_target(
    token_weights: str, normalization: str
) -> None:
    student, teacher, sources = models()
    support = make_support("teacher_topk", sources)
    logits = student.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(
        on_support(logits.log_softmax(-1), support, normalization),
        on_support(teacher, support, normalization),
        strict=True,
    ):
        log_ratio = (p / q).log()
        total = (
            total
            + {
                "student_p": p * log_ratio - p + q,
                "teacher_p": q * log_ratio**2 / 2,
                "none": log_ratio**2 / 2,
            }[token_weights].sum()
        )
    total.backward()
    _, grad = through_token_stats(
        lambda s, q, v: surrogate(s, q, v, normalization, token_weights),
        student,
        teacher,
        support,
    )
    assert logits.grad is not None
    assert relative_error(grad, logits.grad) <= 1e-10


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("divergence_name", list(DIVERGENCES))
def test_edges_are_finite(divergence_name: str, normalization: str) -> None:
    divergence = make_divergence(ObjectiveConfig(divergence=divergence_name))
    student = torch.tensor(
        [[0.0, -math.inf, -2.0], [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [0.0, -50.0, -50.0]]
    ).requires_grad_()
    teacher = torch.tensor(
        [[-1.0, -1.0, -math.inf], [-math.inf] * 3, [-1.0, -2.0, -3.0], [-50.0, 0.0, -50.0]]
    )
    valid = torch.tensor([[True] * 3, [True] * 3, [False] * 3, [True] * 3])
    value = support_divergence(divergence, student, teacher, valid, normalization)
    value.sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(student.grad).all())
    assert float(value[2].detach()) == 0.0 and not student.grad[2].any()


@pytest.mark.parametrize("normalization", ["tail_bucket", "generalized", "renormalized"])
def test_identical_models_are_a_minimum(normalization: str) -> None:
    student, _, sources = models()
    same = student.log_softmax(-1)
    for name in DIVERGENCES:
        divergence = make_divergence(ObjectiveConfig(divergence=name))

        def loss(
            s: torch.Tensor, q: torch.Tensor, v: torch.Tensor, d: object = divergence
        ) -> torch.Tensor:
            return support_divergence(d, s, q, v, normalization)  # type: ignore[arg-type]

        value, grad = through_token_stats(
            loss, student, same, make_support("teacher_topk", sources)
        )
        assert float(value.abs().max()) < 1e-12, name
        assert float(grad.abs().max()) < 1e-12, name


def test_only_the_tail_bucket_sees_mass_that_left_the_support() -> None:
    """A student that moved half its mass outside the support, with unchanged proportions inside."""
    teacher = torch.tensor([[0.6, 0.3]], dtype=torch.float64).log()
    student = teacher - math.log(2)
    valid = torch.ones(1, 2, dtype=torch.bool)
    divergence = make_divergence(ObjectiveConfig())
    values = {
        n: float(support_divergence(divergence, student, teacher, valid, n)) for n in NORMALIZATIONS
    }
    assert values["renormalized"] == pytest.approx(0.0, abs=1e-12)
    assert values["raw"] < 0.0, "raw even rewards it"
    assert values["tail_bucket"] > 0.5


def test_masses_count_valid_entries_only() -> None:
    student = torch.tensor([[0.5, 0.2, 0.1]], dtype=torch.float64).log()
    valid = torch.tensor([[True, False, True]])
    mine, theirs = support_masses(student, student - math.log(2), valid)
    assert float(mine) == pytest.approx(0.6) and float(theirs) == pytest.approx(0.3)


def test_bad_input_is_named() -> None:
    x = torch.zeros(2, 3)
    valid = torch.ones(2, 3, dtype=torch.bool)
    divergence = make_divergence(ObjectiveConfig())
    nan = torch.full((2, 3), math.nan)
    cases = {
        "teacher_logprobs_TJ: shape [2, 4]": (x, torch.zeros(2, 4), valid),
        "teacher_logprobs_TJ: dtype float64": (x, x.double(), valid),
        "student_logprobs_TJ: dtype bfloat16": (x.bfloat16(), x.bfloat16(), valid),
        "valid_TJ: dtype float32": (x, x, x),
        "teacher_logprobs_TJ: 6 of 6": (x, nan, valid),
    }
    for words, (student, teacher, mask) in cases.items():
        with pytest.raises(LossInputError) as caught:
            support_divergence(divergence, student, teacher, mask, "raw")
        assert words in str(caught.value)
    support_divergence(divergence, x, nan, ~valid, "raw")  # invalid entries may hold anything
    with pytest.raises(ConfigError, match="renormalized"):
        support_divergence(divergence, x, x, valid, "renormalised")
    with pytest.raises(ConfigError, match="surrogate"):
        surrogate(x, x, valid, "tail_bucket", "none")
    with pytest.raises(ConfigError, match="token_weights"):
        surrogate(x, x, valid, "raw", "student")
