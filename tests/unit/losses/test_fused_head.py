"""Losses straight from hidden states (chunked, recompute) equal the stored-logits mode in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_rank_worker import local_loss, probe_loss

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.fused.chunked import chunked_loss
from opd_megatron.losses.fused.head import chunk_rows
from opd_megatron.losses.fused.recompute import recompute_token_stats
from opd_megatron.losses.token_stats import TokenStats, token_stats

T, V, REAL, J, H = 11, 16, 13, 5, 6
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    weight[REAL:] = 30.0  # padding that would win if it were read
    ids = torch.randint(0, REAL, (T, 1 + J), generator=generator)
    ids[0, 1:] = ids[0, 0]
    kwargs: dict[str, Any] = {
        "target_ids_T": ids[:, 0],
        "support_ids_TJ": ids[:, 1:],
        "vocab_size": REAL,
        "temperature": 0.7,
    }
    return hidden.requires_grad_(), weight.requires_grad_(), kwargs


def gradients(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def stored(coupled: bool, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients of hidden and weight with all logits stored."""
    hidden, weight, kwargs = inputs()
    stats = token_stats(hidden @ weight.T, **kwargs)
    loss = probe_loss(stats) if coupled else local_loss(stats, slice(0, T))[0]
    (factor * loss).backward()
    return loss.detach(), *gradients(hidden, weight)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 50, None])
def test_recompute_equals_stored_for_losses_that_couple_tokens(chunk_tokens: int | None) -> None:
    hidden, weight, kwargs = inputs()
    loss = probe_loss(recompute_token_stats(hidden, weight, chunk_tokens=chunk_tokens, **kwargs))
    loss.backward()
    seen = (loss.detach(), *gradients(hidden, weight))
    for a, b in zip(seen, stored(coupled=True), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 50, None])
def test_chunked_equals_stored_and_a_later_factor_multiplies(chunk_tokens: int | None) -> None:
    hidden, weight, kwargs = inputs()
    loss, rows = chunked_loss(
        hidden, weight, chunk_loss=local_loss, chunk_tokens=chunk_tokens, **kwargs
    )
    (loss * (1 / 37)).backward()
    seen = (loss.detach(), *gradients(hidden, weight))
    for a, b in zip(seen, stored(coupled=False, factor=1 / 37), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert [i for r in rows for i in range(T)[r]] == list(range(T))


def test_padded_weight_rows_get_no_gradient() -> None:
    hidden, weight, kwargs = inputs()
    chunked_loss(hidden, weight, chunk_loss=local_loss, chunk_tokens=4, **kwargs)[0].backward()
    assert torch.equal(gradients(hidden, weight)[1][REAL:], torch.zeros(3, H, dtype=torch.float64))


def test_tied_weight_gets_both_gradients() -> None:
    hidden, weight, kwargs = inputs()
    grads: list[torch.Tensor] = []
    for mode in ("chunked", "recompute", "stored"):
        weight.grad = None
        embedded = weight[:T] + hidden.detach()  # the same parameter as input embedding
        if mode == "chunked":
            loss, _ = chunked_loss(embedded, weight, chunk_loss=local_loss, **kwargs)
        elif mode == "recompute":
            stats = recompute_token_stats(embedded, weight, **kwargs)
            loss, _ = local_loss(stats, slice(0, T))
        else:
            loss, _ = local_loss(token_stats(embedded @ weight.T, **kwargs), slice(0, T))
        loss.backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[2], **EXACT)
    torch.testing.assert_close(grads[1], grads[2], **EXACT)


@pytest.mark.parametrize("mode", ["chunked", "recompute"])
def test_weight_gradient_is_added_to_main_grad(mode: str) -> None:
    hidden, weight, kwargs = inputs()
    main_grad = torch.ones(V, H, dtype=torch.float64)
    kwargs |= {"weight_main_grad": main_grad, "chunk_tokens": 3}
    if mode == "chunked":
        loss, _ = chunked_loss(hidden, weight, chunk_loss=local_loss, **kwargs)
    else:
        loss = probe_loss(recompute_token_stats(hidden, weight, **kwargs))
    loss.backward()
    _, hidden_grad, weight_grad = stored(coupled=mode == "recompute")
    assert weight.grad is None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, hidden_grad, **EXACT)
    torch.testing.assert_close(main_grad - 1.0, weight_grad, **EXACT)


def test_main_grad_refuses_a_later_factor() -> None:
    hidden, weight, kwargs = inputs()
    main_grad = torch.zeros(V, H, dtype=torch.float64)
    loss, _ = chunked_loss(
        hidden, weight, chunk_loss=local_loss, weight_main_grad=main_grad, **kwargs
    )
    with pytest.raises(LossInputError, match=r"gradient of loss_sum: 0\.5 seen, 1\.0 wanted"):
        (loss * 0.5).backward()


def test_a_gradient_hook_of_the_weight_runs_although_main_grad_took_the_gradient() -> None:
    # Megatron's data-parallel wrapper counts on it to know that the weight is done.
    hidden, weight, kwargs = inputs()
    calls: list[int] = []
    node = weight.view_as(weight).grad_fn
    assert node is not None
    accumulate = node.next_functions[0][0]
    assert accumulate is not None
    handle = accumulate.register_hook(lambda *_: calls.append(1))
    main_grad = torch.zeros(V, H, dtype=torch.float64)
    loss, _ = chunked_loss(
        hidden, weight, chunk_loss=local_loss, weight_main_grad=main_grad, **kwargs
    )
    loss.backward()
    handle.remove()
    assert calls == [1]


def test_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    hidden, weight, kwargs = inputs(torch.bfloat16)
    # 512 chunks of one row: summed in bfloat16 the gradient would stop growing at 256 steps.
    rows = torch.zeros(512, dtype=torch.long)
    hidden = hidden.detach()[rows].requires_grad_()
    kwargs |= {"target_ids_T": rows, "support_ids_TJ": None, "chunk_tokens": 1}

    def loss_of(stats: TokenStats, _: slice) -> tuple[torch.Tensor, None]:
        return stats.sampled_logprobs_T.sum(), None

    chunked_loss(hidden, weight, chunk_loss=loss_of, **kwargs)[0].backward()
    logits = (hidden.detach() @ weight.detach().T).double()
    p = (logits[:1, :REAL] / 0.7).softmax(-1)
    p[0, 0] -= 1.0
    dlogits = torch.zeros(1, V, dtype=torch.float64)
    dlogits[:, :REAL] = -p / 0.7
    wanted = 512 * dlogits.T @ hidden.detach()[:1].double()
    seen = gradients(hidden, weight)[1].double()
    assert float((seen - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    _, hidden_grad, weight_grad = stored(coupled=False)
    hidden, weight, kwargs = inputs()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss, _ = chunked_loss(hidden, weight, chunk_loss=local_loss, chunk_tokens=4, **kwargs)
    assert loss.requires_grad is (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    for tensor, wanted in ((hidden, hidden_grad), (weight, weight_grad)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, wanted, **EXACT)
        else:
            assert tensor.grad is None


def test_without_gradients_nothing_is_added_to_main_grad() -> None:
    hidden, weight, kwargs = inputs()
    main_grad = torch.zeros(V, H, dtype=torch.float64)
    with torch.no_grad():
        loss, _ = chunked_loss(
            hidden, weight, chunk_loss=local_loss, weight_main_grad=main_grad, **kwargs
        )
    torch.testing.assert_close(loss, stored(coupled=False)[0], **EXACT)
    assert not bool(main_grad.any())


def test_a_chunk_whose_loss_is_a_constant_adds_nothing() -> None:
    hidden, weight, kwargs = inputs()

    def none_kept(stats: TokenStats, _: slice) -> tuple[torch.Tensor, None]:
        return stats.log_z_T.new_zeros(()), None

    loss, _ = chunked_loss(hidden, weight, chunk_loss=none_kept, chunk_tokens=4, **kwargs)
    loss.backward()
    assert all(not bool(grad.any()) for grad in gradients(hidden, weight))


@pytest.mark.parametrize("mode", ["chunked", "recompute"])
def test_no_tokens_is_an_ordinary_input(mode: str) -> None:
    _, weight, kwargs = inputs()
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    kwargs |= {"target_ids_T": empty, "support_ids_TJ": empty[:, None]}
    if mode == "chunked":
        loss, extras = chunked_loss(hidden, weight, chunk_loss=local_loss, **kwargs)
        assert extras == []
    else:
        loss = probe_loss(recompute_token_stats(hidden, weight, **kwargs))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not bool(gradients(hidden, weight)[1].any())


def test_a_second_backward_is_refused() -> None:
    hidden, weight, kwargs = inputs()
    loss, _ = chunked_loss(hidden, weight, chunk_loss=local_loss, **kwargs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_chunk_is_about_the_target_size_and_depends_on_the_shard_alone() -> None:
    weight = torch.empty(151_936, 1, dtype=torch.bfloat16)
    assert chunk_rows(weight, None) == 128  # 64 MiB are 220 rows; whole tiles of 128
    assert chunk_rows(weight[: 151_936 // 4], None) == 768
    assert chunk_rows(weight, 7) == 7


BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({"hidden_TH": torch.zeros(T, H, dtype=torch.int64)}, "hidden_TH", "int64", "float32"),
    ({"hidden_TH": torch.zeros(T, 1, H)}, "hidden_TH", f"[{T}, 1, {H}]", "[T, H]"),
    ({"hidden_TH": torch.full((T, H), math.nan).double()}, "hidden_TH", "nan", "finite"),
    ({"local_weight_VH": torch.zeros(V, H)}, "local_weight_VH", "float32", "float64"),
    ({"local_weight_VH": torch.zeros(V, 7).double()}, "local_weight_VH", f"[{V}, 7]", f", {H}]"),
    ({"local_weight_VH": torch.zeros(8, H).double()}, "local_weight_VH", f"[8, {H}]", "13"),
    (
        {"local_weight_VH": torch.full((V, H), math.inf).double()},
        "local_weight_VH",
        "inf",
        "finite",
    ),
    ({"target_ids_T": torch.zeros(3, dtype=torch.long)}, "target_ids_T", "[3]", f"[{T}]"),
    ({"target_ids_T": torch.full((T,), REAL)}, "target_ids_T", "[13, 13]", "[0, 12]"),
    ({"support_ids_TJ": torch.full((T, 1), -1)}, "support_ids_TJ", "[-1, -1]", "[0, 12]"),
    ({"temperature": math.nan}, "temperature", "nan", "positive"),
    ({"chunk_tokens": 0}, "chunk_tokens", "0", "at least 1"),
    ({"weight_main_grad": torch.zeros(V, H)}, "weight_main_grad", "float32", "float64"),
    ({"weight_main_grad": torch.zeros(V, 2).double()}, "weight_main_grad", "[16, 2]", "[16, 6]"),
]


@pytest.mark.parametrize("mode", ["chunked", "recompute"])
@pytest.mark.parametrize(("changes", "name", "seen", "wanted"), BAD)
def test_bad_input_names_tensor_seen_and_wanted(
    mode: str, changes: dict[str, Any], name: str, seen: str, wanted: str
) -> None:
    hidden, weight, kwargs = inputs()
    given: dict[str, Any] = {"hidden_TH": hidden, "local_weight_VH": weight} | kwargs | changes
    with pytest.raises(LossInputError) as caught:
        if mode == "chunked":
            chunked_loss(chunk_loss=local_loss, **given)
        else:
            recompute_token_stats(**given)
    message = str(caught.value)
    assert message.startswith(name) and seen in message and wanted in message


def test_overflow_of_finite_inputs_is_seen_in_the_logits() -> None:
    hidden, weight, kwargs = inputs(torch.float16)
    hidden, weight = hidden.detach() * 1000, weight.detach() * 1000
    with pytest.raises(LossInputError, match="logits of hidden_TH: NaN or"):
        chunked_loss(hidden, weight, chunk_loss=local_loss, **kwargs)
    with pytest.raises(LossInputError, match="logits of hidden_TH: NaN or"):
        recompute_token_stats(hidden, weight, **kwargs)


def test_a_loss_that_is_not_a_sum_is_refused() -> None:
    hidden, weight, kwargs = inputs()
    with pytest.raises(LossInputError, match=r"chunk_loss: shape \[4\] returned for rows 0 to 4"):
        chunked_loss(
            hidden, weight, chunk_loss=lambda s, r: (s.log_z_T, r), chunk_tokens=4, **kwargs
        )


def test_unknown_backend_is_refused() -> None:
    hidden, weight, kwargs = inputs()
    unknown: Any = "cuda"
    with pytest.raises(ConfigError, match="backend='cuda': unknown; use one of: auto, torch"):
        recompute_token_stats(hidden, weight, backend=unknown, **kwargs)
