"""The full-vocabulary divergence from hidden states, chunk by chunk, equals the stored form in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_rank_worker import local_dense_loss
from test_fused_dense import NAMES, divergence_of

from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.fused.dense import DenseStats, dense_stats
from opd_megatron.losses.fused.dense_chunked import chunked_dense_loss

T, V, REAL, J, H = 11, 16, 13, 4, 6
# chi2 against a token that the teacher calls impossible has gradients of 1e18, so sums round.
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Hidden states, weight, teacher logits (-inf for one token), and the rest."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    teacher = torch.randn(T, V, generator=generator, dtype=torch.float64) * 2
    teacher[:, 2] = -torch.inf
    weight[REAL:], teacher[:, REAL:] = 30.0, 50.0  # padding that would win if it were read
    ids = torch.randint(3, REAL, (T, 1 + J), generator=generator)
    kwargs: dict[str, Any] = {
        "target_ids_T": ids[:, 0],
        "support_ids_TJ": ids[:, 1:],
        "vocab_size": REAL,
        "temperature": 0.8,
        "teacher_temperature": 1.3,
    }
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, kwargs


def stored(name: str) -> list[torch.Tensor | None]:
    hidden, weight, teacher, kwargs = inputs()
    stats = dense_stats(hidden @ weight.T, teacher, divergence=divergence_of(name), **kwargs)
    loss, _ = local_dense_loss(stats, slice(0, T))
    (loss / 37).backward()
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("chunk_tokens", [1, 4, 50, None])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_equal_stored_logits_and_a_later_factor_multiplies(
    name: str, chunk_tokens: int | None
) -> None:
    hidden, weight, teacher, kwargs = inputs()
    loss, rows = chunked_dense_loss(
        hidden,
        weight,
        lambda rows: teacher[rows],
        divergence=divergence_of(name),
        chunk_loss=local_dense_loss,
        chunk_tokens=chunk_tokens,
        **kwargs,
    )
    (loss / 37).backward()
    for seen, wanted in zip([loss.detach(), hidden.grad, weight.grad], stored(name), strict=True):
        torch.testing.assert_close(seen, wanted, **EXACT)
    assert [i for r in rows for i in range(T)[r]] == list(range(T))


def test_the_weight_gradient_is_added_to_main_grad() -> None:
    hidden, weight, teacher, kwargs = inputs()
    main_grad = torch.ones(V, H, dtype=torch.float64)
    loss, _ = chunked_dense_loss(
        hidden,
        weight,
        lambda rows: teacher[rows],
        divergence=divergence_of("jsd"),
        chunk_loss=local_dense_loss,
        chunk_tokens=3,
        weight_main_grad=main_grad,
        **kwargs,
    )
    loss.backward()
    wanted = stored("jsd")[2]
    assert wanted is not None and weight.grad is None
    torch.testing.assert_close(main_grad - 1.0, wanted * 37, **EXACT)


def test_one_chunk_of_each_models_logits_is_alive_at_a_time() -> None:
    """The teacher is asked for a chunk when it is needed, in order, and for nothing else."""
    hidden, weight, teacher, kwargs = inputs()
    asked: list[slice] = []

    def teacher_logits(rows: slice) -> torch.Tensor:
        asked.append(rows)
        return teacher[rows]

    def chunk_loss(stats: DenseStats, rows: slice) -> tuple[torch.Tensor, None]:
        assert asked[-1] == rows
        return stats.divergence_T.sum(), None

    chunked_dense_loss(
        hidden,
        weight,
        teacher_logits,
        divergence=divergence_of("reverse_kl"),
        chunk_loss=chunk_loss,
        chunk_tokens=4,
        **kwargs,
    )
    assert asked == [slice(0, 4), slice(4, 8), slice(8, 11)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda x: x[:, :REAL],
            r"teacher_logits\(rows 0 to 11\): shape \[11, 13\] seen, \[11, 16\]",
        ),
        (lambda x: x[1:], r"shape \[10, 16\] seen"),
        (lambda x: x.long(), "dtype int64 seen"),
        (lambda x: x.to("meta"), "device meta seen, cpu wanted"),
        (lambda x: torch.full_like(x, torch.nan), "NaN or \\+inf seen in 11 rows"),
        (lambda x: torch.full_like(x, -torch.inf), "no finite logit seen in 11 rows"),
    ],
)
def test_teacher_logits_that_do_not_fit_are_named(change: Any, words: str) -> None:
    hidden, weight, teacher, kwargs = inputs()
    with pytest.raises(LossInputError, match=words):
        chunked_dense_loss(
            hidden,
            weight,
            lambda rows: change(teacher.nan_to_num(neginf=-50.0)[rows]),
            divergence=divergence_of("reverse_kl"),
            chunk_loss=local_dense_loss,
            **kwargs,
        )
