"""The full-vocabulary form equals autograd of the divergence over all columns, for every f."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from handed_over import HandedOver
from loss_rank_worker import probe_loss
from test_token_stats import dense_stats as textbook

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.divergences import DIVERGENCES, Divergence, make_divergence
from opd_megatron.losses.fused.dense import dense_stats
from opd_megatron.losses.support_matching import support_divergence

T, V, REAL, J = 9, 16, 13, 4
NAMES = sorted(DIVERGENCES)
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def divergence_of(name: str) -> Divergence:
    return make_divergence(ObjectiveConfig(divergence=name, alpha=0.7, jsd_teacher_weight=0.3))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Student and teacher logits, ids [T, 1 + J]; the teacher calls token 2 impossible."""
    generator = torch.Generator().manual_seed(8)
    student, teacher = (
        torch.randn(T, V, generator=generator, dtype=torch.float64).mul(2).to(dtype)
        for _ in range(2)
    )
    teacher[:, 2] = -math.inf
    student[:, REAL:], teacher[:, REAL:] = 40.0, 50.0
    return student, teacher, torch.randint(3, REAL, (T, 1 + J), generator=generator)


def by_autograd(
    name: str, student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """D per token, and the gradient of a loss that couples it with every statistic."""
    z = student.clone().requires_grad_()
    student_logprobs = (z[:, :REAL] / 0.8).log_softmax(-1)
    teacher_logprobs = (teacher[:, :REAL] / 1.3).log_softmax(-1)
    valid = torch.ones_like(student_logprobs, dtype=torch.bool)
    found = support_divergence(
        divergence_of(name), student_logprobs, teacher_logprobs, valid, "raw"
    )
    stats = textbook(z, ids[:, 0], ids[:, 1:], REAL, 0.8)
    (found.sum().pow(2) + probe_loss(stats)).backward()
    assert z.grad is not None
    return found.detach(), z.grad


@pytest.mark.parametrize("in_place", [False, True], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_autograd_over_the_vocabulary(name: str, in_place: bool) -> None:
    student, teacher, ids = inputs()
    leaf = student.clone().requires_grad_()
    seen = dense_stats(
        HandedOver.apply(leaf) if in_place else leaf,
        teacher,
        ids[:, 0],
        divergence_of(name),
        support_ids_TJ=ids[:, 1:],
        vocab_size=REAL,
        temperature=0.8,
        teacher_temperature=1.3,
        grad_in_place=in_place,
    )
    (seen.divergence_T.sum().pow(2) + probe_loss(seen.student)).backward()
    wanted, grad = by_autograd(name, student, teacher, ids)
    torch.testing.assert_close(seen.divergence_T.detach(), wanted, **EXACT)
    assert leaf.grad is not None
    assert float((leaf.grad - grad).norm() / grad.norm()) < 1e-12
    assert (leaf.grad.data_ptr() == leaf.data_ptr()) is in_place
    assert not bool(leaf.grad[:, REAL:].any())


def test_gradient_is_the_closed_form() -> None:
    student, teacher, ids = inputs()
    teacher[:, 2] = 0.5
    divergence = divergence_of("jsd")
    leaf = student.clone().requires_grad_()
    dense_stats(leaf, teacher, ids[:, 0], divergence, vocab_size=REAL).divergence_T.sum().backward()
    p = student[:, :REAL].softmax(-1)
    slope = divergence.derivative(p.log() - teacher[:, :REAL].log_softmax(-1))
    wanted = p * (slope - (p * slope).sum(-1, keepdim=True))
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, :REAL], wanted, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_student_equal_to_teacher_has_no_divergence_and_no_gradient(name: str) -> None:
    student, _, ids = inputs()
    leaf = student.clone().requires_grad_()
    seen = dense_stats(leaf, student, ids[:, 0], divergence_of(name), vocab_size=REAL)
    seen.divergence_T.sum().backward()
    assert leaf.grad is not None
    assert float(seen.divergence_T.detach().abs().max()) < 1e-14
    assert float(leaf.grad.abs().max()) < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_calls_a_token_impossible_has_a_finite_gradient(name: str) -> None:
    student, teacher, ids = inputs(torch.float32)
    student[:, 1] = -math.inf
    student[:, 3] = -200.0  # below what exp of float32 holds
    leaf = student.clone().requires_grad_()
    seen = dense_stats(leaf, teacher, ids[:, 0].clamp_min(4), divergence_of(name), vocab_size=REAL)
    (seen.divergence_T.sum() + seen.student.entropy_T.sum()).backward()
    assert leaf.grad is not None
    assert bool(torch.isfinite(seen.divergence_T).all()) and bool(torch.isfinite(leaf.grad).all())


def test_teacher_statistics_are_its_own_and_constant() -> None:
    student, teacher, ids = inputs()
    seen = dense_stats(
        student.requires_grad_(),
        teacher,
        ids[:, 0],
        divergence_of("reverse_kl"),
        support_ids_TJ=ids[:, 1:],
        vocab_size=REAL,
        teacher_temperature=1.3,
    )
    wanted = textbook(teacher, ids[:, 0], ids[:, 1:], REAL, 1.3)
    for name in ("log_z_T", "entropy_T", "sampled_logprobs_T", "support_logprobs_TJ"):
        torch.testing.assert_close(getattr(seen.teacher, name), getattr(wanted, name), **EXACT)
        assert not getattr(seen.teacher, name).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_have_float32_statistics(dtype: torch.dtype) -> None:
    student, teacher, ids = inputs(dtype)
    leaf = student.clone().requires_grad_()
    seen = dense_stats(leaf, teacher.float(), ids[:, 0], divergence_of("jsd"), vocab_size=REAL)
    exact = student.double().requires_grad_()
    wanted = dense_stats(exact, teacher.double(), ids[:, 0], divergence_of("jsd"), vocab_size=REAL)
    seen.divergence_T.sum().backward()
    wanted.divergence_T.sum().backward()
    assert seen.divergence_T.dtype == torch.float32
    torch.testing.assert_close(
        seen.divergence_T.double(), wanted.divergence_T, rtol=1e-5, atol=1e-6
    )
    assert leaf.grad is not None and exact.grad is not None
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=rtol, atol=1e-6)


BAD: list[tuple[dict[str, Any], str, str, str]] = [
    (
        {"teacher": torch.zeros(T, V, dtype=torch.int32)},
        "teacher_local_logits_TV",
        "int32",
        "float",
    ),
    ({"teacher": torch.zeros(T, 20).double()}, "teacher_local_logits_TV", "[9, 20]", "[9, 16]"),
    ({"teacher": torch.zeros(T, V)}, "teacher_local_logits_TV", "float32", "float64"),
    (
        {"teacher": torch.full((T, V), math.nan).double()},
        "teacher_local_logits_TV",
        "NaN",
        "[9, 16]",
    ),
    ({"student": torch.full((T, V), math.inf).double()}, "local_logits_TV", "inf", "[9, 16]"),
    (
        {"student": torch.zeros(T, 5).double(), "teacher": torch.zeros(T, 5).double()},
        *("local_logits_TV", "[9, 5]", "13"),
    ),
    ({"temperature": -1.0}, "temperature", "-1.0", "positive"),
    ({"teacher_temperature": 0.0}, "teacher_temperature", "0.0", "positive"),
    (
        {"grad_in_place": True, "student": torch.zeros(T, V).double().requires_grad_()},
        *("local_logits_TV", "leaf", "output of an operation"),
    ),
]


@pytest.mark.parametrize(("changes", "name", "seen", "wanted"), BAD)
def test_bad_input_names_tensor_seen_and_wanted(
    changes: dict[str, Any], name: str, seen: str, wanted: str
) -> None:
    student, teacher, ids = inputs()
    given: dict[str, Any] = {"student": student, "teacher": teacher} | changes
    with pytest.raises(LossInputError) as caught:
        dense_stats(
            given.pop("student"),
            given.pop("teacher"),
            ids[:, 0],
            divergence_of("reverse_kl"),
            vocab_size=REAL,
            **given,
        )
    message = str(caught.value)
    assert message.startswith(name) and seen in message and wanted in message
