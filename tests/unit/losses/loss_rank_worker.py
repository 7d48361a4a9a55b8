"""One rank of the parallel tests: `python loss_rank_worker.py RANK STORE CASES OUT`.

Four gloo ranks form tensor-parallel groups of 2 and of 4. For every case of the CASES file (a torch
archive) a rank computes the statistics and the gradient of a fixed loss on its shard, counts the
collectives of forward and backward, and writes all of it to OUT.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.filters import gather_scores, percentile_window
from opd_megatron.losses.sequences import Sequences
from opd_megatron.losses.token_stats import TokenStats, token_stats
from opd_megatron.losses.vocab_topk import vocab_topk
from opd_megatron.losses.whitening import whiten

WORLD_SIZE = 4


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


def run_case(case: dict[str, Any], rank: int, tp: int, group: dist.ProcessGroup) -> dict[str, Any]:
    width = case["logits"].shape[1] // tp
    column = (rank % tp) * width
    shard = case["logits"][:, column : column + width].clone().requires_grad_()
    calls: list[str] = []
    real = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("all_reduce")
        return real(*args, **kwargs)

    dist.all_reduce = counted
    try:
        stats = token_stats(
            shard,
            case["targets"],
            support_ids_TJ=case["support"],
            vocab_size=case["vocab_size"],
            temperature=case["temperature"],
            group=group,
        )
        forward_calls = len(calls)
        probe_loss(stats).backward()
    finally:
        dist.all_reduce = real
    return {
        "forward_calls": forward_calls,
        "backward_calls": len(calls) - forward_calls,
        "outputs": [stats.log_z_T, stats.entropy_T, stats.sampled_logprobs_T],
        "support": stats.support_logprobs_TJ,
        "grad": shard.grad,
        "top": vocab_topk(shard, 5, vocab_size=case["vocab_size"], group=group),
        "top_beyond": vocab_topk(shard, 40, vocab_size=case["vocab_size"], group=group),
    }


def run_nan(case: dict[str, Any], rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """NaN on rank 0 only: with allow_nan every rank must see it; without, rank 0 raises alone."""
    width = case["logits"].shape[1] // WORLD_SIZE
    shard = case["logits"][:, rank * width : (rank + 1) * width].clone()
    if rank == 0:
        shard[1, 0] = float("nan")
    kwargs: dict[str, Any] = {"vocab_size": case["vocab_size"], "group": group}
    stats = token_stats(shard, case["targets"], allow_nan=True, **kwargs)
    message = ""
    if rank == 0:
        # The other ranks do not call: if the check came after a collective this would hang.
        try:
            token_stats(shard, case["targets"], **kwargs)
        except LossInputError as error:
            message = str(error)
    return {"log_z": stats.log_z_T, "message": message}


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
    group_of = {2: pairs[rank // 2], 4: dist.group.WORLD}
    cases = torch.load(cases_path)
    results: dict[Any, Any] = {
        (name, tp): run_case(case, rank, tp, group_of[tp])
        for name, case in cases.items()
        for tp in (2, 4)
    }
    results["nan"] = run_nan(next(iter(cases.values())), rank, group_of[4])
    results["batch"] = run_batch_functions(rank, group_of[4])
    torch.save(results, Path(out_path))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
