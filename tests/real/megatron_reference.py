"""The same steps in plain torch on a float64 `transformers` model: sample by sample, dense logits, no packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd_megatron.config.schema import CorrectionConfig, OptimizerConfig
from opd_megatron.types import Sample

OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5, weight_decay=0.1, clip_grad=0.05)
CORRECTION = CorrectionConfig(kind="masked", low=0.5, high=2.0)


@dataclass
class Reference:
    """What every layout must arrive at."""

    losses: list[float]
    norms: list[float]
    clipped_gradients: list[dict[str, torch.Tensor]]
    student_logprobs: torch.Tensor
    weights: dict[str, torch.Tensor]


def reference_model(path: Path, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa"
    )


# (log pi [L, V], log pi of the sampled tokens [L], sample) -> loss of every token [L], before the importance weight
TokenLosses = Callable[[torch.Tensor, torch.Tensor, Sample], torch.Tensor]


def sampled_token(log_p: torch.Tensor, pi: torch.Tensor, sample: Sample) -> torch.Tensor:
    """-A log pi with A = log q - log pi, held constant."""
    teacher = torch.from_numpy(sample.scores.sampled_logprobs).double()
    return -(teacher - pi.detach()) * pi


def _teacher_support(sample: Sample, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, logprobs = sample.scores.topk_ids, sample.scores.topk_logprobs
    assert ids is not None and logprobs is not None
    return torch.from_numpy(ids[:, :k]).long(), torch.from_numpy(logprobs[:, :k]).double()


def topk_support(log_p: torch.Tensor, pi: torch.Tensor, sample: Sample) -> torch.Tensor:
    """KL(student || teacher) over the teacher's top-8 and one bucket for everything else."""
    ids, log_q = _teacher_support(sample, 8)
    log_p = log_p.gather(1, ids)
    rest_p, rest_q = 1 - log_p.exp().sum(1), 1 - log_q.exp().sum(1)
    return (log_p.exp() * (log_p - log_q)).sum(1) + rest_p * (rest_p.log() - rest_q.log())


def full_vocabulary(log_p: torch.Tensor, pi: torch.Tensor, sample: Sample) -> torch.Tensor:
    """KL(student || teacher) over all tokens."""
    ids, log_q = _teacher_support(sample, log_p.shape[1])
    log_p, log_q = log_p.gather(1, ids), log_q.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


TOKEN_LOSSES: dict[str, TokenLosses] = {
    "sampled_token": sampled_token,
    "topk_support": topk_support,
    "full_vocabulary": full_vocabulary,
}


def _loss(
    model: Any, samples: list[Sample], token_losses: TokenLosses
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weighted token losses over the number of tokens, and the log-probs of the sampled tokens."""
    total, count, kept = torch.zeros((), dtype=torch.float64), 0, []
    for sample in samples:
        rollout, length = sample.rollout, len(sample.rollout.response_ids)
        if not length:
            continue
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        log_p = model(ids[None]).logits[0].log_softmax(-1)[-length - 1 : -1]
        pi = log_p.gather(1, ids[-length:, None])[:, 0]
        ratio = (pi.detach() - torch.from_numpy(rollout.behavior_logprobs).double()).exp()
        weight = torch.where((ratio >= CORRECTION.low) & (ratio <= CORRECTION.high), ratio, 0.0)
        total = total + (weight * token_losses(log_p, pi, sample)).sum()
        count += length
        kept.append(pi.detach())
    return total / count, torch.cat(kept)


def reference_run(path: Path, batches: list[list[Sample]], token_losses: TokenLosses) -> Reference:
    """One optimizer step per batch."""
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
        loss, student = _loss(model, samples, token_losses)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        adam.step()
        losses.append(float(loss))
        logprobs.append(student)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return Reference(losses, norms, gradients, logprobs[0], weights)
