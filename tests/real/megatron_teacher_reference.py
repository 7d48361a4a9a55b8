"""What teachers inside the learner should say and make of a step: `transformers` in float64, and textbook losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from megatron_cases import TOPK, VOCAB
from megatron_reference import TOKEN_LOSSES, TokenLosses, reference_model

from opd_megatron.teacher.target import Target
from opd_megatron.types import Sample

# On two shards of the vocabulary.
ALIAS = (7, 200)


def teacher_logprobs(work: Path, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """By sample id, [L, V] float64 in the student's ids; of the teachers that are models."""
    models = {name: reference_model(work / name, torch.float64) for name in ("small", "big")}
    found = {}
    for sample in samples:
        rollout, target = sample.rollout, Target.parse(sample.scores.teacher)
        length = len(rollout.response_ids)
        if target.name == "served" or not length:
            continue
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        members = {}
        for name in target.members:
            with torch.no_grad():
                log_q = models[name](ids[None]).logits[0].log_softmax(-1)[-length - 1 : -1]
            if name == "big":
                columns = torch.arange(VOCAB)
                columns[list(ALIAS)] = torch.tensor(ALIAS[::-1])
                log_q = log_q[:, columns]
            members[name] = log_q
        found[rollout.sample_id] = mean_of(target, members)
    return found


def mean_of(target: Target, log_q: dict[str, torch.Tensor]) -> torch.Tensor:
    """[L, V] log-probs of the target, from probabilities."""
    if not target.mean:
        return log_q[target.name]
    if target.mean == "geometric_mean":
        parts = torch.stack([log_q[name].exp() ** weight for name, weight in target.weights])
        return (parts.prod(0) / parts.prod(0).sum(1, keepdim=True)).log()
    return torch.stack([weight * log_q[name].exp() for name, weight in target.weights]).sum(0).log()


def scored(samples: list[Sample], log_q: dict[str, torch.Tensor]) -> list[Sample]:
    """The same samples as if a server had scored them."""
    made = []
    for sample in samples:
        log_q_LV = log_q.get(sample.rollout.sample_id)
        if log_q_LV is not None:
            ids = torch.tensor(sample.rollout.response_ids)
            best = log_q_LV.topk(TOPK)
            scores = dataclasses.replace(
                sample.scores,
                sampled_logprobs=log_q_LV.gather(1, ids[:, None])[:, 0].numpy(),
                topk_ids=best.indices.numpy(),
                topk_logprobs=best.values.numpy(),
            )
            sample = dataclasses.replace(sample, scores=scores)
        made.append(sample)
    return made


def token_losses_of(objective: str, log_q: dict[str, torch.Tensor]) -> TokenLosses:
    """Textbook forms: the divergence over all tokens, or over a set and one bucket for the rest."""
    if objective == "sampled":
        return TOKEN_LOSSES["sampled_token"]
    if objective == "teacher_topk":
        return TOKEN_LOSSES["topk_support"]

    def losses(log_p: torch.Tensor, pi: torch.Tensor, sample: Sample) -> torch.Tensor:
        q_LV = log_q[sample.rollout.sample_id]
        p, q = log_p.exp(), q_LV.exp()
        if objective == "full reverse_kl":
            return (p * (log_p - q_LV)).sum(1)
        if objective == "full forward_kl":
            return (q * (q_LV - log_p)).sum(1)
        if objective == "full jsd":
            m = 0.3 * q + 0.7 * p
            return (0.3 * q * (q_LV - m.log()) + 0.7 * p * (log_p - m.log())).sum(1)
        inside = torch.zeros_like(log_p)
        for one in (log_p.detach(), q_LV):
            inside.scatter_(1, one.topk(TOPK).indices, 1.0)
        rest_p, rest_q = 1 - (inside * p).sum(1), 1 - (inside * q).sum(1)
        within = (inside * p * (log_p - q_LV)).sum(1)
        return within + rest_p * (rest_p.log() - rest_q.log())

    return losses
