"""One rank of the parallel tests: `python loss_rank_worker.py RANK STORE CASES OUT`.

Four gloo ranks form tensor-parallel groups of 1, 2 and 4. For every case of the CASES file (a torch
archive) a rank computes the statistics and the gradient of a fixed loss on its shard, in every mode
of the loss core, counts the collectives of forward and backward, and writes all of it to OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.filters import gather_scores, percentile_window
from opd_megatron.losses.fused.chunked import chunked_loss
from opd_megatron.losses.fused.dense import DenseStats, dense_stats
from opd_megatron.losses.fused.dense_chunked import chunked_dense_loss
from opd_megatron.losses.fused.recompute import recompute_token_stats
from opd_megatron.losses.sequences import Sequences
from opd_megatron.losses.token_stats import TokenStats, token_stats
from opd_megatron.losses.vocab_topk import vocab_topk
from opd_megatron.losses.whitening import whiten

WORLD_SIZE = 4
MODES = (
    "in_place",
    "dense",
    "dense_chunked",
    "dense_chunked_partial",
    "chunked",
    "chunked_partial",
    "recompute",
    "recompute_partial",
)
MODE_CASES = ("plain", "padded", "empty_rank")


def probe_loss(stats: TokenStats, seed: int = 3) -> torch.Tensor:
    """A loss that couples tokens and uses every output with its own random coefficient."""
    generator = torch.Generator().manual_seed(seed)

    def random(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    loss = (stats.log_z_T * random(stats.log_z_T)).sum()
    loss = loss + (stats.entropy_T * random(stats.entropy_T)).sum()
    loss = loss + (stats.sampled_logprobs_T * random(stats.sampled_logprobs_T)).sum().tanh()
    if stats.support_logprobs_TJ is not None:
        support = stats.support_logprobs_TJ
        loss = loss + (support.exp() * random(support)).sum().pow(2)
    return loss


def local_loss(stats: TokenStats, rows: slice) -> tuple[torch.Tensor, slice]:
    """A token-local loss that uses every output and is not linear in any; and its rows."""
    loss_T = (
        stats.sampled_logprobs_T.exp() + stats.entropy_T.square() + 0.1 * stats.log_z_T.square()
    )
    if stats.support_logprobs_TJ is not None:
        loss_T = loss_T + (stats.support_logprobs_TJ.exp() * stats.support_logprobs_TJ).sum(-1)
    return loss_T.sum(), rows


def local_dense_loss(stats: DenseStats, rows: slice) -> tuple[torch.Tensor, slice]:
    """A token-local loss of the divergence and of the student's statistics."""
    loss, rows = local_loss(stats.student, rows)
    weights = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)[rows]
    return loss + (weights.to(stats.divergence_T) * stats.divergence_T).sum(), rows


def calls_of(run: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Collectives during `run`, and during backward of the loss it returns."""
    calls: list[str] = []
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "broadcast")
    real = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        loss = run()
        forward_calls = len(calls)
        loss.backward()
    finally:
        for name in names:
            setattr(dist, name, real[name])
    return forward_calls, len(calls) - forward_calls


def shard_of(tensor: torch.Tensor, rank: int, tp: int, dim: int) -> torch.Tensor:
    """This rank's part of the vocabulary, a leaf."""
    return tensor.chunk(tp, dim=dim)[rank % tp].clone().requires_grad_()


def run_case(case: dict[str, Any], rank: int, tp: int, group: dist.ProcessGroup) -> dict[str, Any]:
    shard = shard_of(case["logits"], rank, tp, dim=1)
    found: list[TokenStats] = []

    def run() -> torch.Tensor:
        found.append(
            token_stats(
                shard,
                case["targets"],
                support_ids_TJ=case["support"],
                vocab_size=case["vocab_size"],
                temperature=case["temperature"],
                group=group,
            )
        )
        return probe_loss(found[0])

    calls = calls_of(run)
    stats = found[0]
    return {
        "calls": calls,
        "outputs": [stats.log_z_T, stats.entropy_T, stats.sampled_logprobs_T],
        "support": stats.support_logprobs_TJ,
        "grad": shard.grad,
        "top": vocab_topk(shard, 5, vocab_size=case["vocab_size"], group=group),
        "top_beyond": vocab_topk(shard, 40, vocab_size=case["vocab_size"], group=group),
    }


def run_mode(
    mode: str, case: dict[str, Any], rank: int, tp: int, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Loss, this rank's gradients and the collectives of one mode; `group` None for unsharded."""
    kwargs: dict[str, Any] = {
        "target_ids_T": case["targets"],
        "support_ids_TJ": case["support"],
        "vocab_size": case["vocab_size"],
        "temperature": case["temperature"],
        "group": group,
    }
    logits, teacher = (shard_of(case[name], rank, tp, dim=1) for name in ("logits", "teacher"))
    weight = shard_of(case["weight"], rank, tp, dim=0)
    hidden = case["hidden"].clone().requires_grad_()
    head: dict[str, Any] = {"hidden_TH": hidden, "local_weight_VH": weight, "chunk_tokens": 4}
    if mode.endswith("_partial"):
        head["reduce_hidden_grad"] = False
    losses: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        if mode == "in_place":
            stats = token_stats(logits * 1, grad_in_place=True, **kwargs)
            losses.append(probe_loss(stats))
        elif mode == "dense":
            found = dense_stats(
                logits,
                teacher.detach(),
                divergence=make_divergence(ObjectiveConfig(divergence="jsd")),
                teacher_temperature=1.2,
                **kwargs,
            )
            losses.append(found.divergence_T.sum().square() + probe_loss(found.student))
        elif mode.startswith("dense_chunked"):
            losses.append(
                chunked_dense_loss(
                    teacher_logits=lambda rows: teacher.detach()[rows],
                    divergence=make_divergence(ObjectiveConfig(divergence="jsd")),
                    chunk_loss=local_dense_loss,
                    teacher_temperature=1.2,
                    **head,
                    **kwargs,
                )[0]
            )
        elif mode.startswith("chunked"):
            losses.append(chunked_loss(chunk_loss=local_loss, **head, **kwargs)[0])
        else:
            losses.append(probe_loss(recompute_token_stats(**head, **kwargs)))
        return losses[0]

    calls = calls_of(run)
    return {
        "calls": calls,
        "loss": losses[0].detach(),
        "logits": logits.grad,
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def run_nan(case: dict[str, Any], rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """NaN on rank 0 only: with allow_nan every rank must see it; without, rank 0 raises alone."""
    width = case["logits"].shape[1] // WORLD_SIZE
    shard = case["logits"][:, rank * width : (rank + 1) * width].clone()
    if rank == 0:
        shard[1, 0] = float("nan")
    kwargs: dict[str, Any] = {"vocab_size": case["vocab_size"], "group": group}
    stats = token_stats(shard, case["targets"], allow_nan=True, **kwargs)
    messages: list[str] = []
    if rank == 0:
        # The other ranks do not call: if the check came after a collective this would hang.
        weight = case["weight"].chunk(WORLD_SIZE)[rank]
        hidden = case["hidden"].index_fill(0, torch.tensor([1]), float("nan"))
        teacher = case["teacher"].chunk(WORLD_SIZE, dim=1)[rank]
        divergence = make_divergence(ObjectiveConfig())
        for call in (
            lambda: token_stats(shard, case["targets"], **kwargs),
            lambda: dense_stats(teacher, shard, case["targets"], divergence, **kwargs),
            lambda: chunked_loss(hidden, weight, case["targets"], local_loss, **kwargs),
            lambda: recompute_token_stats(hidden, weight, case["targets"], **kwargs),
        ):
            try:
                call()
            except LossInputError as error:
                messages.append(str(error))
    return {"log_z": stats.log_z_T, "messages": messages}


def run_batch_functions(rank: int, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Filter and whitening of a batch of 23 tokens cut unevenly over the ranks."""
    scores, sets = batch_of_scores()
    mine = slice((0, 3, 3, 14)[rank], (3, 3, 14, 23)[rank])
    kept = sets.kept_T[mine]
    everything = gather_scores(scores[mine], kept, group)
    part = Sequences(sets.ids_T[mine], sets.num_sequences)
    return {
        "window": percentile_window(scores[mine], kept, everything, 30.0, 70.0),
        "whitened": whiten(scores[mine], part, group)[0],
    }


def batch_of_scores() -> tuple[torch.Tensor, Sequences]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 9, (23,), generator=generator).double()  # with ties
    ids = torch.randint(-1, 2, (23,), generator=generator)
    return scores, Sequences(ids, 2)


def main() -> None:
    rank, store_path, cases_path, out_path = int(sys.argv[1]), *sys.argv[2:5]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store_path}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([i]) for i in range(WORLD_SIZE)]
    group_of = {1: alone[rank], 2: pairs[rank // 2], 4: dist.group.WORLD}
    cases = torch.load(cases_path)
    results: dict[Any, Any] = {
        (name, tp): run_case(case, rank, tp, group_of[tp])
        for name, case in cases.items()
        for tp in (1, 2, 4)
    }
    for name in MODE_CASES:
        for tp in (1, 2, 4):
            for mode in MODES:
                results[mode, name, tp] = run_mode(mode, cases[name], rank, tp, group_of[tp])
    results["nan"] = run_nan(next(iter(cases.values())), rank, group_of[4])
    results["batch"] = run_batch_functions(rank, group_of[4])
    torch.save(results, Path(out_path))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
