"""Runs under torchrun: the learner against `transformers`, many layouts in one launch.

    torchrun --nproc-per-node 2 megatron_worker.py WORK_DIRECTORY parity|layouts

Rank 0 holds the reference and writes WORK_DIRECTORY/<what>.json: per case the differences, judged
by the tests.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_tiny import LAYOUTS, LAYOUTS_4, LENGTHS, write_model, write_samples

from opd_megatron.config.schema import (
    BatchConfig,
    CorrectionConfig,
    LearnerConfig,
    OptimizerConfig,
    Recipe,
    StudentConfig,
)
from opd_megatron.types import Sample

WORLD_TIMEOUT_S = 120.0
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5, weight_decay=0.1, clip_grad=0.05)
CORRECTION = CorrectionConfig(kind="masked", low=0.5, high=2.0)
VOCAB = 259


def recipe_for(model: Path, **learner: Any) -> Recipe:
    """A recipe for a tiny student; `dp` fills the world."""
    used = 1
    for key in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        used *= learner.get(key, 1)
    return Recipe(
        device="cpu",
        student=StudentConfig(path=str(model)),
        optimizer=OPTIMIZER,
        correction=CORRECTION,
        batch=BatchConfig(tokens_per_microbatch=64),
        learner=LearnerConfig(
            precision="fp32", data_parallel=dist.get_world_size() // used, **learner
        ),
    )


def new_state(recipe: Recipe) -> Any:
    """Groups and model of a layout, replacing those of the previous case."""
    from opd_megatron.megatron import parallel
    from opd_megatron.megatron.state import build_state

    parallel.start_model_parallel(parallel.layout_of(recipe.learner), recipe.seed, WORLD_TIMEOUT_S)
    return build_state(recipe)


def snapshot(state: Any, value: str = "weight") -> dict[str, torch.Tensor]:
    """Copies of all weights or reduced gradients on rank 0 (a stream may alias live buffers)."""
    from opd_megatron.megatron import hf

    streamed = hf.stream(state.module, state.arch, state.groups, value)
    return {name: tensor.clone() for name, tensor in streamed}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest entry of the reference."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


# ---------------------------------------------------------------- parity


def reference_model(path: Path, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa"
    )


def parity_case(model_path: Path, **learner: Any) -> dict[str, float] | None:
    """Log-probs, logits and the exported weights of one model in one layout."""
    from opd_megatron.megatron.commands import _probe_batch
    from opd_megatron.megatron.step import score

    state = new_state(recipe_for(model_path, **learner))
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
            local = state.module(square, positions, None)
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
    models = {
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


# ---------------------------------------------------------------- layouts


@dataclass
class Reference:
    """The same two steps in plain torch on a float64 `transformers` model."""

    losses: list[float]
    norms: list[float]
    clipped_gradients: list[dict[str, torch.Tensor]]
    student_logprobs: torch.Tensor
    weights: dict[str, torch.Tensor]


def reference_loss(model: Any, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum w A log pi / tokens, one sample after the other, and the log-probs."""
    total, count, kept = torch.zeros((), dtype=torch.float64), 0, []
    for sample in samples:
        rollout, length = sample.rollout, len(sample.rollout.response_ids)
        if not length:
            continue
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        log_p = model(ids[None]).logits[0].log_softmax(-1)[:-1]
        pi = log_p.gather(1, ids[1:, None])[-length:, 0]
        teacher = torch.from_numpy(sample.scores.sampled_logprobs).double()
        ratio = (pi.detach() - torch.from_numpy(rollout.behavior_logprobs).double()).exp()
        weight = torch.where((ratio >= CORRECTION.low) & (ratio <= CORRECTION.high), ratio, 0.0)
        total = total - (weight * (teacher - pi.detach()) * pi).sum()
        count += length
        kept.append(pi.detach())
    return total / count, torch.cat(kept)


def reference_run(path: Path, batches: list[list[Sample]]) -> Reference:
    model = reference_model(path, torch.float64)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    losses, norms, gradients, logprobs = [], [], [], []
    for samples in batches:
        adam.zero_grad()
        loss, student = reference_loss(model, samples)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        adam.step()
        losses.append(float(loss))
        logprobs.append(student)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return Reference(losses, norms, gradients, logprobs[0], weights)


def layout_case(
    model_path: Path, batches: list[Path], reference: Reference | None, **learner: Any
) -> dict[str, float] | None:
    """Two steps in one layout against the reference."""
    from opd_megatron.exchange.batch_file import read_batch, read_index
    from opd_megatron.megatron.step import train

    state = new_state(recipe_for(model_path, **learner))
    state.load_hf(model_path)
    steps, gradients = [], []
    for batch in batches:
        read = functools.partial(read_batch, batch)
        steps.append(train(state, read_index(batch), read))
        if not state.recipe.learner.distributed_optimizer:
            gradients.append(snapshot(state, "gradient"))
    weights = snapshot(state)
    if reference is None:
        return None
    result = {
        "loss": max(
            abs(s.metrics["train/loss"] / loss - 1)
            for s, loss in zip(steps, reference.losses, strict=True)
        ),
        "norm": max(
            abs(s.metrics["train/grad_norm"] / norm - 1)
            for s, norm in zip(steps, reference.norms, strict=True)
        ),
        "logprobs": float(
            (steps[0].values["student_logprobs"] - reference.student_logprobs).abs().max()
        ),
        "weights": max(
            float((weights[n] - reference.weights[n]).abs().max()) for n in reference.weights
        ),
        "masked_frac": steps[0].metrics["offpolicy/masked_frac"],
        "applied": float(all(s.why_not_applied is None for s in steps)),
    }
    if gradients:
        result["gradient"] = max(
            relative(mine[n], theirs[n])
            for mine, theirs in zip(gradients, reference.clipped_gradients, strict=True)
            for n in theirs
        )
    return result


def resume_case(
    model_path: Path, batches: list[Path], directory: Path, save_in: Any, load_in: Any
) -> dict[str, float] | None:
    """Step, save, load in another layout, step: weights against the uninterrupted run."""
    from opd_megatron.exchange.batch_file import read_batch, read_index
    from opd_megatron.megatron import checkpoint
    from opd_megatron.megatron.step import train

    def step(state: Any, batch: Path) -> None:
        train(state, read_index(batch), lambda samples: read_batch(batch, samples))

    straight = new_state(recipe_for(model_path, **save_in))
    straight.load_hf(model_path)
    step(straight, batches[0])
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    checkpoint.save(straight, directory)
    step(straight, batches[1])
    wanted = snapshot(straight)
    resumed = new_state(recipe_for(model_path, **load_in))
    checkpoint.load(resumed, directory)
    steps_loaded = resumed.optimizer_step
    step(resumed, batches[1])
    weights = snapshot(resumed)
    if dist.get_rank() != 0:
        return None
    return {
        "steps_loaded": float(steps_loaded),
        "weights": max(float((weights[n] - wanted[n]).abs().max()) for n in wanted),
    }


def broken_gradient_case(model_path: Path, batch: Path, **learner: Any) -> dict[str, Any] | None:
    """A NaN in one gradient of the last rank only: is any weight of any rank touched?"""
    from opd_megatron.exchange.batch_file import read_batch, read_index
    from opd_megatron.megatron import hf
    from opd_megatron.megatron.step import train

    state = new_state(recipe_for(model_path, **learner))
    state.load_hf(model_path)
    before = snapshot(state)
    index, read = read_index(batch), functools.partial(read_batch, batch)
    unit, parameter = hf.local_parameters(state.module, state.arch)[3]
    is_broken = dist.get_rank() == dist.get_world_size() - 1
    fault = parameter.register_hook(lambda grad: grad * torch.nan) if is_broken else None
    refused = train(state, index, read)
    after = snapshot(state)
    if fault is not None:
        fault.remove()
    healthy = train(state, index, read)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, unit.hf)
    if dist.get_rank() != 0:
        return None
    return {
        "why_not_applied": refused.why_not_applied,
        "parameter": " + ".join(names[-1]),
        "changed": sum(not torch.equal(before[n], after[n]) for n in before),
        "healthy_why_not": healthy.why_not_applied,
        "steps": state.optimizer_step,
    }


def layouts(work: Path) -> dict[str, Any]:
    rank, results = dist.get_rank(), {}
    batches = [work / f"batch{i}.safetensors" for i in range(len(LENGTHS))]
    samples = [
        write_samples(path, lengths, VOCAB, seed=i)
        for i, (path, lengths) in enumerate(zip(batches, LENGTHS, strict=True))
        if rank == 0
    ]
    models = {"untied": work / "untied", "tied": work / "tied"}
    if rank == 0:
        for name, path in models.items():
            write_model(path, tied=name == "tied")
    dist.barrier()
    cases = LAYOUTS if dist.get_world_size() == 2 else LAYOUTS_4
    for name, path in models.items():
        reference = reference_run(path, samples) if rank == 0 else None
        for layout, learner in cases.items():
            results[f"{name}-{layout}"] = layout_case(path, batches, reference, **learner)
    if dist.get_world_size() == 2:
        moves = {
            "tp2-to-pp2": (LAYOUTS["tp2"], LAYOUTS["pp2"]),
            "pp2-to-dp2": (LAYOUTS["pp2"], LAYOUTS["dp2"]),
            "distributed_optimizer-dp2-to-tp2": (
                LAYOUTS["dp2_distributed_optimizer"],
                {"tensor_parallel": 2, "distributed_optimizer": True},
            ),
            "distributed_optimizer-dp2-to-dp2": (LAYOUTS["dp2_distributed_optimizer"],) * 2,
            "tp2-to-tp2": (LAYOUTS["tp2"],) * 2,
        }
        for name, (save_in, load_in) in moves.items():
            results[name] = resume_case(models["tied"], batches, work / name, save_in, load_in)
        for name in ("dp2", "dp2_distributed_optimizer", "tp2", "pp2"):
            case = broken_gradient_case(models["untied"], batches[0], **LAYOUTS[name])
            results[f"broken-{name}"] = case
    return results


def main() -> None:
    from opd_megatron.megatron import cpu_shim, parallel

    torch.set_num_threads(1)
    cpu_shim.install()
    parallel.start_process_group("cpu", WORLD_TIMEOUT_S)
    work, what = Path(sys.argv[1]), sys.argv[2]
    results = {"parity": parity, "layouts": layouts}[what](work)
    if dist.get_rank() == 0:
        (work / f"{what}.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
