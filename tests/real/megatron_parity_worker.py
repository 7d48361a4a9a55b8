"""Runs under torchrun: logits, log-probs and exported weights against `transformers` on the same files.

torchrun --nproc-per-node 2 megatron_parity_worker.py WORK_DIRECTORY parity
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_cases import VOCAB, Case
from megatron_reference import reference_model
from megatron_setup import new_state, recipe_for, run_worker, snapshot
from megatron_tiny import write_model

from opd_megatron.megatron.step import score


def parity_case(model_path: Path, **learner: Any) -> dict[str, float] | None:
    """Log-probs, logits and the exported weights of one model in one layout."""
    from opd_megatron.megatron.commands import _probe_batch

    state = new_state(recipe_for(model_path, Case(learner)))
    state.load_hf(model_path)
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 17, 30, 2)]
    index, batch = _probe_batch(probes)
    values = score(state, index, lambda _: batch, temperature=1.0)
    exported = snapshot(state)
    square = torch.randint(0, VOCAB, (2, 24), generator=generator)
    logits = None
    if state.layout.pp == 1:
        positions = torch.arange(24)[None].expand(2, -1)
        with torch.no_grad():
            local = state.modules[0](square, positions, None)
        parts = [torch.empty_like(local) for _ in range(state.layout.tp)]
        dist.all_gather(parts, local.contiguous(), group=state.groups.tp)
        logits = torch.cat(parts, dim=-1)[..., :VOCAB]
    if dist.get_rank() != 0:
        return None
    model = reference_model(model_path, torch.float32)
    logprobs, entropies = [], []
    with torch.no_grad():
        for ids in probes:
            log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            logprobs.append(log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        wanted = model(square).logits
    weights = model.state_dict()
    if state.arch.tied_embeddings:
        weights.pop("lm_head.weight")
    result = {
        "logprobs": float((values["student_logprobs"] - torch.cat(logprobs)).abs().max()),
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
    layouts: dict[str, dict[str, Any]] = {
        "tp1": {},
        "tp2": {"tensor_parallel": 2},
        "pp2": {"pipeline_parallel": 2},
    }
    results = {}
    for model_name, settings in models.items():
        path = work / model_name
        if dist.get_rank() == 0:
            write_model(path, **settings)
        dist.barrier()
        for layout_name, learner in layouts.items():
            results[f"{model_name}-{layout_name}"] = parity_case(path, **learner)
    return results


if __name__ == "__main__":
    run_worker({"parity": parity})
