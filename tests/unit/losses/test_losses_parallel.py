"""The losses on 2 and 4 gloo processes equal the unsharded result; no collective in backward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_rank_worker import (
    MODE_CASES,
    MODES,
    WORLD_SIZE,
    batch_of_scores,
    probe_loss,
    run_mode,
)

from opd_megatron.losses.filters import gather_scores, percentile_window
from opd_megatron.losses.token_stats import token_stats
from opd_megatron.losses.vocab_topk import vocab_topk
from opd_megatron.losses.whitening import whiten

pytestmark = pytest.mark.real  # ranks of their own, on gloo

ROOT = Path(__file__).parents[3]


def make_cases() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(11)

    def case(columns: int, vocab_size: int, dtype: torch.dtype, support: bool) -> dict[str, Any]:
        logits = torch.randn(10, columns, generator=generator, dtype=torch.float64) * 3
        ids = torch.randint(0, vocab_size, (10, 7), generator=generator)
        return {
            "logits": logits.to(dtype),
            "targets": ids[:, 0],
            "support": ids[:, 1:] if support else None,
            "vocab_size": vocab_size,
            "temperature": 0.8,
            "teacher": torch.randn(10, columns, generator=generator, dtype=torch.float64) * 3,
            "hidden": torch.randn(10, 6, generator=generator, dtype=torch.float64),
            "weight": torch.randn(columns, 6, generator=generator, dtype=torch.float64),
        }

    return {
        "plain": case(24, 24, torch.float64, True),
        "padded": case(24, 19, torch.float64, True),
        # 4 ranks of 6 columns: the last rank holds nothing but padding.
        "empty_rank": case(24, 17, torch.float64, False),
        "float32": case(128, 101, torch.float32, True),
        "bfloat16": case(128, 101, torch.bfloat16, True),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("vocab_parallel")
    cases = make_cases()
    torch.save(cases, folder / "cases.pt")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = Path(__file__).with_name("loss_rank_worker.py")
    arguments = [str(folder / "store"), str(folder / "cases.pt")]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), *arguments, str(folder / f"{rank}.pt")],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD_SIZE, "\n".join(errors)
    return cases, [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["plain", "padded", "empty_rank", "float32", "bfloat16"])
def test_shards_together_equal_the_unsharded_result(runs: Any, name: str, tp: int) -> None:
    cases, results = runs
    case = cases[name]
    logits = case["logits"].clone().requires_grad_()
    whole = token_stats(
        logits,
        case["targets"],
        support_ids_TJ=case["support"],
        vocab_size=case["vocab_size"],
        temperature=case["temperature"],
    )
    probe_loss(whole).backward()
    assert logits.grad is not None
    exact = case["logits"].dtype == torch.float64
    close: dict[str, Any] = (
        {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 1e-5}
    )
    for rank in range(tp):
        seen = results[rank][name, tp]
        wanted = [whole.log_z_T, whole.entropy_T, whole.sampled_logprobs_T]
        for a, b in zip(seen["outputs"], wanted, strict=True):
            torch.testing.assert_close(a, b, **close)
        if case["support"] is not None:
            torch.testing.assert_close(seen["support"], whole.support_logprobs_TJ, **close)
    grad = torch.cat([results[rank][name, tp]["grad"] for rank in range(tp)], dim=1)
    if case["logits"].dtype == torch.bfloat16:
        close = {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(grad, logits.grad, **close)


@pytest.mark.parametrize("tp", [2, 4])
def test_every_rank_holds_bitwise_the_same_statistics(runs: Any, tp: int) -> None:
    _, results = runs
    first = results[0]["padded", tp]["outputs"]
    for rank in range(1, tp):
        for a, b in zip(first, results[rank]["padded", tp]["outputs"], strict=True):
            assert torch.equal(a, b)


def test_two_collectives_forward_and_none_backward(runs: Any) -> None:
    _, results = runs
    for name in make_cases():
        for tp in (2, 4):
            assert results[0][name, tp]["calls"] == (2, 0), (name, tp)
        assert results[0][name, 1]["calls"] == (0, 0), name


# (forward, backward) all-reduces for 10 tokens in chunks of 4; hidden's gradient is one of them.
COLLECTIVES = {
    "in_place": (2, 0),
    "dense": (3, 0),
    "chunked": (2 * 3, 1),
    "chunked_partial": (2 * 3, 0),
    "dense_chunked": (3 * 3, 1),
    "dense_chunked_partial": (3 * 3, 0),
    "recompute": (2, 1),
    "recompute_partial": (2, 0),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_collectives_of_every_mode(runs: Any, mode: str, tp: int) -> None:
    _, results = runs
    wanted = COLLECTIVES[mode] if tp > 1 else (0, 0)
    for name in MODE_CASES:
        for rank in range(WORLD_SIZE):
            assert results[rank][mode, name, tp]["calls"] == wanted, (name, rank)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODE_CASES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_shards_equals_the_unsharded_result(
    runs: Any, mode: str, name: str, tp: int
) -> None:
    cases, results = runs
    whole = run_mode(mode, cases[name], 0, 1, None)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    seen = [results[rank][mode, name, tp] for rank in range(tp)]
    for rank in range(tp):
        torch.testing.assert_close(seen[rank]["loss"], whole["loss"], **close)
    if whole["logits"] is not None:
        grad = torch.cat([s["logits"] for s in seen], dim=1)
        torch.testing.assert_close(grad, whole["logits"], **close)
        return
    torch.testing.assert_close(torch.cat([s["weight"] for s in seen]), whole["weight"], **close)
    if mode.endswith("_partial"):
        total = torch.stack([s["hidden"] for s in seen]).sum(0)
        torch.testing.assert_close(total, whole["hidden"], **close)
    else:
        for s in seen:
            torch.testing.assert_close(s["hidden"], whole["hidden"], **close)


def test_a_nan_on_one_rank_reaches_every_rank_or_raises_before_any_collective(runs: Any) -> None:
    _, results = runs
    for rank in range(WORLD_SIZE):
        assert results[rank]["nan"]["log_z"].isnan().nonzero().tolist() == [[1]]
    tensors = ("local_logits_TV: NaN", "teacher_local_logits_TV: NaN", "hidden_TH", "hidden_TH")
    messages = results[0]["nan"]["messages"]
    assert [m.startswith(t) for m, t in zip(messages, tensors, strict=True)] == [True] * 4, messages


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["plain", "padded", "empty_rank"])
def test_vocab_topk_equals_topk_of_the_real_columns(runs: Any, name: str, tp: int) -> None:
    cases, results = runs
    case = cases[name]
    wanted = case["logits"][:, : case["vocab_size"]].topk(5, dim=1).indices
    for rank in range(tp):
        assert torch.equal(results[rank][name, tp]["top"], wanted)
    assert torch.equal(vocab_topk(case["logits"], 5, vocab_size=case["vocab_size"]), wanted)


@pytest.mark.parametrize("tp", [2, 4])
def test_vocab_topk_beyond_the_vocabulary_fills_with_minus_one(runs: Any, tp: int) -> None:
    cases, results = runs
    size = cases["padded"]["vocab_size"]
    for ids in results[0]["padded", tp]["top_beyond"].tolist():
        assert sorted(ids[:size]) == list(range(size)) and set(ids[size:]) == {-1}


def test_a_percentile_window_of_the_global_batch_is_the_same_for_every_split(runs: Any) -> None:
    _, results = runs
    scores, sets = batch_of_scores()
    everything = gather_scores(scores, sets.kept_T, None)
    whole = percentile_window(scores, sets.kept_T, everything, 30.0, 70.0)
    assert torch.equal(torch.cat([r["batch"]["window"] for r in results]), whole)
    assert 0 < int(whole.sum()) < int(sets.kept_T.sum())


def test_whitening_a_set_spread_over_ranks_equals_whitening_it_whole(runs: Any) -> None:
    _, results = runs
    whole, _ = whiten(*batch_of_scores())
    torch.testing.assert_close(torch.cat([r["batch"]["whitened"] for r in results]), whole)
