"""The Triton row kernels against float64 on the same logits: values, gradients, edges."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import Case, HandedOver, assert_same_gradient, assert_same_outputs, probe_loss

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.token_stats import token_stats

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "plain": Case(9, 128, 128, 5, FP32),
    "odd_padded": Case(5, 4219, 4201, 65, FP32),
    "odd_padded_bf16": Case(5, 4219, 4201, 65, BF16),
    "half": Case(5, 301, 300, 3, FP16),
    "several_blocks_bf16": Case(3, 12_305, 12_301, 64, BF16),
    "no_support": Case(4, 130, 129, 0, BF16),
    "one_id": Case(4, 130, 129, 1, BF16),
    "more_ids_than_vocabulary": Case(3, 7, 7, 40, FP32),
    "two_tiles_of_ids": Case(3, 515, 500, 130, FP32),
    "impossible_tokens": Case(6, 200, 190, 8, FP32, impossible=True),
    "impossible_tokens_bf16": Case(6, 5000, 4990, 8, BF16, impossible=True),
    "one_column": Case(3, 1, 1, 2, FP32),
    "one_row": Case(1, 5003, 5000, 9, BF16),
}


@pytest.mark.parametrize("in_place", [False, True], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_float64(
    name: str, in_place: bool, device: torch.device
) -> None:
    case = CASES[name]
    logits, targets, support = case.inputs(device)
    exact = logits.double().cpu().requires_grad_()
    wanted = token_stats(
        exact,
        targets.cpu(),
        support_ids_TJ=support.cpu(),
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        backend="torch",
    )
    probe_loss(wanted).backward()
    leaf = logits.clone().requires_grad_()
    seen = token_stats(
        HandedOver.apply(leaf) if in_place else leaf,
        targets,
        support_ids_TJ=support,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        backend="triton",
        grad_in_place=in_place,
    )
    probe_loss(seen).backward()
    assert_same_outputs(seen, wanted)
    assert leaf.grad is not None and exact.grad is not None
    assert (leaf.grad.data_ptr() == leaf.data_ptr()) is in_place
    assert_same_gradient(leaf.grad, exact.grad)
    assert not bool(leaf.grad[:, case.vocab_size :].any())


def test_no_tokens_is_an_ordinary_input(device: torch.device) -> None:
    leaf = torch.zeros(0, 16, device=device, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long, device=device)
    stats = token_stats(leaf, empty, vocab_size=13, backend="triton")
    stats.entropy_T.sum().backward()
    assert stats.log_z_T.shape == (0,) and leaf.grad is not None


def test_rows_may_be_strided(device: torch.device) -> None:
    logits, targets, _ = Case(6, 40, 40, 1, FP32).inputs(device)
    wide = torch.full((6, 100), 7.0, device=device)
    wide[:, 3:43] = logits
    seen = token_stats(wide[:, 3:43], targets, vocab_size=40, backend="triton")
    wanted = token_stats(logits, targets, vocab_size=40, backend="torch")
    torch.testing.assert_close(seen.log_z_T, wanted.log_z_T)
    turned = token_stats(logits.T.contiguous().T, targets, vocab_size=40, backend="triton")
    torch.testing.assert_close(turned.entropy_T, wanted.entropy_T)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_raise_or_stay_in_their_row(bad: float, device: torch.device) -> None:
    logits, targets, _ = Case(5, 5000, 5000, 1, FP32).inputs(device)
    logits[2, 4500] = bad
    with pytest.raises(LossInputError, match=r"local_logits_TV: NaN or \+inf .* first row 2 "):
        token_stats(logits, targets, vocab_size=5000, backend="triton")
    stats = token_stats(logits, targets, vocab_size=5000, backend="triton", allow_nan=True)
    assert stats.log_z_T.isnan().nonzero().tolist() == [[2]]
    assert stats.entropy_T.isnan().nonzero().tolist() == [[2]]


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    logits, targets, support = CASES["several_blocks_bf16"].inputs(device)
    grads: list[torch.Tensor] = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        stats = token_stats(
            leaf, targets, support_ids_TJ=support, vocab_size=12_301, backend="triton"
        )
        probe_loss(stats).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


def test_a_rising_row_is_rescaled_in_every_block(device: torch.device) -> None:
    # The running maximum changes in each block of columns, by more than exp can hold.
    logits = torch.linspace(-300, 300, 13_000, device=device).expand(3, -1).contiguous()
    targets = torch.full((3,), 12_999, device=device)
    seen = token_stats(logits, targets, vocab_size=13_000, backend="triton")
    wanted = token_stats(logits.double(), targets, vocab_size=13_000, backend="torch")
    torch.testing.assert_close(seen.entropy_T.double(), wanted.entropy_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.log_z_T.double(), wanted.log_z_T, rtol=1e-6, atol=1e-6)


def test_float64_is_refused_by_the_kernels(device: torch.device) -> None:
    logits = torch.zeros(2, 8, dtype=torch.float64, device=device)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    with pytest.raises(ConfigError, match="backend='triton': keeps float32 statistics"):
        token_stats(logits, targets, vocab_size=8, backend="triton")


def test_offsets_beyond_31_bits_are_reached(cuda_device: torch.device) -> None:
    device = cuda_device
    num_tokens, num_columns = 14_200, 151_936  # 2.16e9 logits, 4.3 GB
    logits = torch.zeros(num_tokens, num_columns, dtype=BF16, device=device).requires_grad_()
    targets = torch.zeros(num_tokens, dtype=torch.long, device=device)
    stats = token_stats(
        HandedOver.apply(logits),
        targets,
        vocab_size=num_columns,
        backend="triton",
        grad_in_place=True,
    )
    torch.testing.assert_close(
        stats.entropy_T, torch.full_like(stats.entropy_T, math.log(num_columns))
    )
    stats.sampled_logprobs_T.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, 0].float(), torch.ones(num_tokens, device=device))
