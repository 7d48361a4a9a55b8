"""Runs under torchrun: logits, log-probs and exported weights against `transformers` on the same files.

torchrun --nproc-per-node 2 megatron_parity_worker.py WORK_DIRECTORY parity
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_cases import VOCAB, Case
from megatron_reference import reference_model
from megatron_setup import new_state, recipe_for, run_worker, snapshot
from megatron_tiny import write_model

from opd_megatron.data.packing import MicroBatch
from opd_megatron.megatron.forward import DeviceMicroBatch, MicroResult, run_micro_batches
from opd_megatron.megatron.state import LearnerState
from opd_megatron.megatron.step import packed_batch, score

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "tp2_sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2},
    "pp2_interleaved": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "cp2": {"context_parallel": 2},
    "dp2_distributed_optimizer": {"distributed_optimizer": True},
}


def keep_logits(output: torch.Tensor, batch: DeviceMicroBatch) -> MicroResult:
    count = (batch.output_index_T >= 0).sum()
    return MicroResult(output.new_zeros(()), count, {"logits": output[0].clone()})


def packed_logits(
    state: LearnerState, micro_batches: Sequence[MicroBatch], num_tokens: int
) -> torch.Tensor:
    """What the last stage computes for every response token, as the learner runs it: [N, V] on every rank."""
    outputs = run_micro_batches(
        state.models, state.groups, micro_batches, keep_logits, forward_only=True
    )
    local = torch.zeros(num_tokens, state.arch.padded_vocab_size // state.layout.tp)
    for output in outputs:
        kept = output.output_index_T >= 0
        local[output.output_index_T[kept]] = output.values["logits"][kept]
    dist.all_reduce(local, group=state.groups.dp_cp)
    last = dist.get_global_rank(state.groups.pp, state.layout.pp - 1)
    dist.broadcast(local, src=last, group=state.groups.pp)
    parts = [torch.empty_like(local) for _ in range(state.layout.tp)]
    dist.all_gather(parts, local, group=state.groups.tp)
    return torch.cat(parts, dim=-1)[:, : state.arch.vocab_size]


def parity_case(model_path: Path, **learner: Any) -> dict[str, float] | None:
    """Log-probs, logits and the exported weights of one model in one layout."""
    from opd_megatron.megatron.commands import _probe_batch

    state = new_state(recipe_for(model_path, Case(learner)))
    state.load_hf(model_path)
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 17, 30, 2)]
    index, batch = _probe_batch(probes)
    values = score(state, index, lambda _: batch, temperature=1.0)
    packed = packed_logits(
        state, packed_batch(state, index, lambda _: batch), index.num_response_tokens
    )
    exported = snapshot(state)
    square = torch.randint(0, VOCAB, (2, 24), generator=generator)
    logits = None
    if state.layout.pp == state.layout.cp == 1 and not state.recipe.learner.sequence_parallel:
        positions = torch.arange(24)[None].expand(2, -1)
        with torch.no_grad():
            local = state.modules[0](square, positions, None)
        parts = [torch.empty_like(local) for _ in range(state.layout.tp)]
        dist.all_gather(parts, local.contiguous(), group=state.groups.tp)
        logits = torch.cat(parts, dim=-1)[..., :VOCAB]
    if dist.get_rank() != 0:
        return None
    model = reference_model(model_path, torch.float32)
    rows, logprobs, entropies = [], [], []
    with torch.no_grad():
        for ids in probes:
            rows.append(model(torch.tensor([ids])).logits[0, :-1])
            log_p = rows[-1].log_softmax(-1)
            logprobs.append(log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        wanted = model(square).logits
    weights = model.state_dict()
    if state.arch.tied_embeddings:
        weights.pop("lm_head.weight")
    result = {
        "logprobs": float((values["student_logprobs"] - torch.cat(logprobs)).abs().max()),
        "packed_logits": float((packed - torch.cat(rows)).abs().max()),
        "entropy": float((values["student_entropy"] - torch.cat(entropies)).abs().max()),
        "tensors_that_differ": float(
            len(set(exported) ^ set(weights))
            + sum(not torch.equal(exported[n], weights[n]) for n in weights if n in exported)
        ),
    }
    if logits is not None:
        result["logits"] = float((logits - wanted).abs().max())
    return result


def parity(work: Path) -> dict[str, Any]:
    models: dict[str, dict[str, Any]] = {
        "qwen3": {},
        "qwen3_tied": {"family": "qwen3", "tied": True},
        "qwen2": {"family": "qwen2"},
        "qwen2_tied": {"family": "qwen2", "tied": True},
        "llama": {"family": "llama"},
    }
    results = {}
    for model_name, settings in models.items():
        path = work / model_name
        if dist.get_rank() == 0:
            write_model(path, **settings)
        dist.barrier()
        for layout_name, learner in LAYOUTS.items():
            results[f"{model_name}-{layout_name}"] = parity_case(path, **learner)
    return results


if __name__ == "__main__":
    run_worker({"parity": parity})
