"""token_stats against dense float64: values, gradients, padding, dtypes, edges, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from handed_over import HandedOver
from loss_rank_worker import probe_loss
from torch.utils.checkpoint import checkpoint

from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.fused import rows_torch
from opd_megatron.losses.token_stats import TokenStats, token_stats


def dense_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    support: torch.Tensor | None,
    vocab_size: int,
    temperature: float = 1.0,
) -> TokenStats:
    """The textbook formulas on the unpadded logits, differentiated by autograd."""
    z = logits[:, :vocab_size] / temperature
    logp = z.log_softmax(-1)
    finite = torch.where(logp == -math.inf, torch.zeros_like(logp), logp)
    return TokenStats(
        log_z_T=z.logsumexp(-1),
        entropy_T=-(logp.exp() * finite).sum(-1),
        sampled_logprobs_T=logp.gather(1, targets[:, None])[:, 0],
        support_logprobs_TJ=None if support is None else logp.gather(1, support),
    )


def example(
    rows: int = 9, columns: int = 16, vocab_size: int = 13, width: int = 5, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    support = torch.randint(0, vocab_size, (rows, width), generator=generator)
    return logits, targets, support


def test_values_and_gradients_equal_the_dense_formula_in_float64() -> None:
    logits, targets, support = example()
    ours, dense = (logits.clone().requires_grad_() for _ in range(2))
    a = token_stats(ours, targets, support_ids_TJ=support, vocab_size=13, temperature=0.7)
    b = dense_stats(dense, targets, support, 13, 0.7)
    for name in ("log_z_T", "entropy_T", "sampled_logprobs_T", "support_logprobs_TJ"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)
    probe_loss(a).backward()
    probe_loss(b).backward()
    torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_every_output() -> None:
    logits, targets, support = example(rows=4)
    support[0] = support[0, 0]  # duplicated ids must add up

    def outputs(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stats = token_stats(z, targets[:4], support_ids_TJ=support, vocab_size=13, temperature=1.3)
        assert stats.support_logprobs_TJ is not None
        return (
            stats.log_z_T,
            stats.entropy_T,
            stats.sampled_logprobs_T,
            stats.support_logprobs_TJ,
        )

    assert torch.autograd.gradcheck(outputs, (logits.clone().requires_grad_(),))


def test_padded_columns_have_no_probability_and_no_gradient() -> None:
    logits, targets, support = example()
    logits[:, 13:] = 50.0  # would own all the probability if it were read
    ours = logits.clone().requires_grad_()
    stats = token_stats(ours, targets, support_ids_TJ=support, vocab_size=13)
    torch.testing.assert_close(stats.log_z_T, logits[:, :13].logsumexp(-1), rtol=1e-12, atol=1e-12)
    probe_loss(stats).backward()
    assert ours.grad is not None
    assert torch.equal(ours.grad[:, 13:], torch.zeros(9, 3, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 3, 40, 10_000])
def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    logits, targets, support = example()
    grads = []
    for elements in (block, 1 << 22):
        monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", {"cpu": elements})
        z = logits.clone().requires_grad_()
        probe_loss(token_stats(z, targets, support_ids_TJ=support, vocab_size=13)).backward()
        grads.append(z.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    logits, targets, support = example(rows=6, columns=512, vocab_size=500, scale=4.0)
    logits = logits.to(dtype)
    ours = logits.clone().requires_grad_()
    stats = token_stats(ours, targets, support_ids_TJ=support, vocab_size=500)
    exact = dense_stats(logits.double(), targets, support, 500)
    for name in ("log_z_T", "entropy_T", "sampled_logprobs_T", "support_logprobs_TJ"):
        assert getattr(stats, name).dtype == torch.float32
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(exact, name), rtol=2e-6, atol=2e-6
        )
    stats.entropy_T.sum().backward()
    assert ours.grad is not None and ours.grad.dtype == dtype


def test_gradient_in_float32_is_close_to_float64() -> None:
    logits, targets, support = example(rows=6, columns=512, vocab_size=500, scale=4.0)
    low, high = logits.float().requires_grad_(), logits.float().double().requires_grad_()
    probe_loss(token_stats(low, targets, support_ids_TJ=support, vocab_size=500)).backward()
    probe_loss(token_stats(high, targets, support_ids_TJ=support, vocab_size=500)).backward()
    assert low.grad is not None and high.grad is not None
    torch.testing.assert_close(low.grad.double(), high.grad, rtol=1e-4, atol=1e-6)


def test_minus_infinity_in_the_logits_is_probability_zero() -> None:
    logits, targets, support = example()
    logits[:, 4] = -math.inf
    targets[targets == 4] = 0
    support[support == 4] = 0
    ours = logits.clone().requires_grad_()
    stats = token_stats(ours, targets, support_ids_TJ=support, vocab_size=13)
    expected = dense_stats(logits, targets, support, 13)
    torch.testing.assert_close(stats.entropy_T, expected.entropy_T, rtol=1e-12, atol=1e-12)
    probe_loss(stats).backward()
    assert ours.grad is not None and bool(torch.isfinite(ours.grad).all())
    assert torch.equal(ours.grad[:, 4], torch.zeros(9, dtype=torch.float64))


def test_large_logits_do_not_overflow() -> None:
    logits, targets, support = example()
    stats = token_stats((logits * 1e4).float(), targets, support_ids_TJ=support, vocab_size=13)
    assert bool(torch.isfinite(stats.log_z_T).all())
    assert bool((stats.entropy_T >= 0).all())


def test_no_tokens_is_an_ordinary_input() -> None:
    logits = torch.zeros(0, 16, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    stats = token_stats(logits, empty, support_ids_TJ=empty[:, None], vocab_size=13)
    stats.sampled_logprobs_T.sum().backward()
    assert stats.entropy_T.shape == (0,)
    assert logits.grad is not None and logits.grad.shape == (0, 16)


def test_only_the_logits_and_small_tensors_are_saved() -> None:
    logits, targets, _ = example(rows=8, columns=256, vocab_size=256)
    saved: list[torch.Tensor] = []
    z = logits.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        stats = token_stats(z, targets, vocab_size=256)
    assert stats.log_z_T.requires_grad
    big = [t for t in saved if t.numel() >= z.numel()]
    assert [t.data_ptr() for t in big] == [z.data_ptr()]


def test_works_under_activation_recomputation() -> None:
    logits, targets, support = example()
    grads = []
    for recompute in (False, True):
        z = logits.clone().requires_grad_()

        def loss_of(x: torch.Tensor) -> torch.Tensor:
            return probe_loss(token_stats(x, targets, support_ids_TJ=support, vocab_size=13))

        loss = checkpoint(loss_of, z, use_reentrant=False) if recompute else loss_of(z)
        loss.backward()
        grads.append(z.grad)
    assert torch.equal(grads[0], grads[1])


def test_in_place_gradient_is_the_same_and_lies_in_the_logits() -> None:
    logits, targets, support = example()
    grads: list[torch.Tensor] = []
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        z = HandedOver.apply(leaf)
        stats = token_stats(
            z, targets, support_ids_TJ=support, vocab_size=13, grad_in_place=in_place
        )
        probe_loss(stats).backward()
        assert leaf.grad is not None
        assert (leaf.grad.data_ptr() == leaf.data_ptr()) is in_place
        grads.append(leaf.grad.clone())
    assert torch.equal(grads[0], grads[1])


def test_in_place_gradient_flows_on_to_what_made_the_logits() -> None:
    generator = torch.Generator().manual_seed(4)
    _, targets, support = example()
    grads: list[torch.Tensor] = []
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    for in_place in (False, True):
        w = weight.clone().requires_grad_()
        stats = token_stats(
            hidden @ w.T, targets, support_ids_TJ=support, vocab_size=13, grad_in_place=in_place
        )
        probe_loss(stats).backward()
        assert w.grad is not None
        grads.append(w.grad)
    assert torch.equal(grads[0], grads[1])


def test_in_place_is_refused_for_a_leaf_and_for_shared_memory() -> None:
    logits, targets, _ = example()
    leaf = logits.clone().requires_grad_()
    with pytest.raises(LossInputError, match=r"local_logits_TV: a leaf .* \[9, 16\]"):
        token_stats(leaf, targets, vocab_size=13, grad_in_place=True)
    with pytest.raises(LossInputError, match="or a view of it, seen"):
        token_stats(leaf.view(1, 9, 16).squeeze(0), targets, vocab_size=13, grad_in_place=True)
    made = leaf * 1
    for shared in (made[:1].expand(9, 16), made.as_strided((9, 16), (8, 1))):
        with pytest.raises(LossInputError, match="local_logits_TV: elements that share memory"):
            token_stats(shared, targets, vocab_size=13, grad_in_place=True)
    for apart in (made.T.contiguous().T, made[:, :14]):
        token_stats(apart, targets, vocab_size=13, grad_in_place=True)
    token_stats(logits, targets, vocab_size=13, grad_in_place=True)  # nothing to write: a forward


def test_a_row_without_a_finite_logit_is_refused_or_let_through() -> None:
    logits, targets, _ = example()
    logits[3] = -math.inf
    with pytest.raises(LossInputError, match="no finite logit seen in 1 rows, first row 3"):
        token_stats(logits, targets, vocab_size=13)
    stats = token_stats(logits, targets, vocab_size=13, allow_nan=True)
    assert stats.sampled_logprobs_T.isfinite().tolist() == [t != 3 for t in range(9)]


def test_tensors_of_another_device_and_empty_vocabularies_are_named() -> None:
    logits, targets, support = example()
    with pytest.raises(LossInputError, match="target_ids_T: device meta seen, cpu wanted"):
        token_stats(logits, targets.to("meta"), vocab_size=13)
    with pytest.raises(LossInputError, match="support_ids_TJ: device meta seen"):
        token_stats(logits, targets, support_ids_TJ=support.to("meta"), vocab_size=13)
    with pytest.raises(LossInputError, match="vocab_size: -1 seen"):
        token_stats(logits[:0], targets[:0], vocab_size=-1)


def test_in_place_raises_where_the_logits_are_needed_later() -> None:
    logits, targets, _ = example()
    leaf = logits.clone().requires_grad_()
    z = leaf * 1.0
    needs_z = z.square().sum()  # saved z before, so its backward runs after
    stats = token_stats(z, targets, vocab_size=13, grad_in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stats.entropy_T.sum() + needs_z).backward()
    produced = leaf.tanh()  # tanh saves its output
    stats = token_stats(produced, targets, vocab_size=13, grad_in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.entropy_T.sum().backward()


def test_in_place_refuses_a_second_backward() -> None:
    logits, targets, _ = example()
    leaf = logits.clone().requires_grad_()
    loss = token_stats(leaf * 1.0, targets, vocab_size=13, grad_in_place=True).entropy_T.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_with_another_user_get_the_sum_of_both_gradients() -> None:
    logits, targets, _ = example()
    grads: list[torch.Tensor] = []
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        z = leaf * 1.0
        stats = token_stats(z, targets, vocab_size=13, grad_in_place=in_place)
        (stats.entropy_T.sum() + (3.0 * z).sum()).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


def broken(**changes: Any) -> dict[str, Any]:
    logits, targets, support = example()
    return {"logits": logits.float(), "targets": targets, "support": support} | changes


@pytest.mark.parametrize(
    ("changes", "tensor", "seen", "wanted"),
    [
        ({"logits": torch.zeros(9, 16, dtype=torch.int64)}, "local_logits_TV", "int64", "float32"),
        ({"logits": torch.zeros(9, 1, 16)}, "local_logits_TV", "[9, 1, 16]", "[T, V/tp]"),
        ({"logits": torch.zeros(9, 8)}, "local_logits_TV", "[9, 8]", "13 columns"),
        ({"logits": torch.full((9, 16), math.nan)}, "local_logits_TV", "NaN", "[9, 16]"),
        ({"logits": torch.full((9, 16), math.inf)}, "local_logits_TV", "inf", "row 0"),
        ({"targets": torch.zeros(8, dtype=torch.long)}, "target_ids_T", "[8]", "[9]"),
        ({"targets": torch.zeros(9)}, "target_ids_T", "float32", "int64"),
        ({"targets": torch.full((9,), 13)}, "target_ids_T", "[13, 13]", "[0, 12]"),
        ({"targets": torch.full((9,), -1)}, "target_ids_T", "[-1, -1]", "[0, 12]"),
        ({"support": torch.zeros(9, dtype=torch.long)}, "support_ids_TJ", "[9]", "[9, J]"),
        ({"support": torch.full((9, 2), 99)}, "support_ids_TJ", "[99, 99]", "[0, 12]"),
        ({"temperature": 0.0}, "temperature", "0.0", "positive"),
    ],
)
def test_bad_input_names_tensor_seen_and_wanted(
    changes: dict[str, Any], tensor: str, seen: str, wanted: str
) -> None:
    given = broken(**changes)
    with pytest.raises(LossInputError) as caught:
        token_stats(
            given["logits"],
            given["targets"],
            support_ids_TJ=given["support"],
            vocab_size=13,
            temperature=given.get("temperature", 1.0),
        )
    message = str(caught.value)
    assert message.startswith(tensor) and seen in message and wanted in message


def test_nan_can_be_let_through_and_stays_in_its_row() -> None:
    given = broken()
    given["logits"][2, 5] = math.nan
    stats = token_stats(given["logits"], given["targets"], vocab_size=13, allow_nan=True)
    assert bool(stats.log_z_T.isnan()[2]) and int(stats.log_z_T.isnan().sum()) == 1
