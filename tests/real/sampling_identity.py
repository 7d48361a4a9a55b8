"""Student equal to teacher, drawn on a real server: what the loss sees at every temperature and truncation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiny_servers import VOCAB, reference_logprobs

from opd_megatron.config.schema import RolloutConfig
from opd_megatron.controller.generation import generate_group, sampling_of
from opd_megatron.exchange.batch_file import read_whole, write_batch
from opd_megatron.losses.batch_plan import make_plan
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import PlannedTokens, TokenInputs, make_token_loss
from opd_megatron.losses.token_stats import token_stats
from opd_megatron.megatron.step import batch_arrays
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.scoring import score_rollouts
from opd_megatron.types import Prompt, Rollout, Sample

PROMPTS = ((3, 4, 5, 6), (7, 8), (9,), (3, 4, 5, 10))


@dataclass(frozen=True)
class Identity:
    """kl: mean of log pi - log q in nats. masked_frac, gradient: largest entry by the logits. kept_nats: largest error
    of the kept mass against its definition; kept_mass: mean. num_tokens, num_outside: drawn outside the kept set."""

    kl: float
    masked_frac: float
    gradient: float
    kept_nats: float
    kept_mass: float
    num_tokens: int
    num_outside: int


def kept_logmass(logprobs_LV: np.ndarray, rollout: RolloutConfig) -> tuple[np.ndarray, np.ndarray]:
    """[L] log of the mass that truncation keeps, by its definition, and [L, V] which tokens it keeps."""
    order_LV = np.argsort(-logprobs_LV, axis=1, kind="stable")
    sorted_LV = np.exp(np.take_along_axis(logprobs_LV, order_LV, axis=1))
    kept_LV = sorted_LV.cumsum(axis=1) - sorted_LV <= rollout.top_p
    kept_LV &= np.arange(VOCAB) < (VOCAB if rollout.top_k == -1 else rollout.top_k)
    kept_LV &= sorted_LV >= rollout.min_p * sorted_LV[:, :1]
    mass_L = (sorted_LV * kept_LV).sum(axis=1)
    in_vocabulary_LV = np.zeros_like(kept_LV)
    np.put_along_axis(in_vocabulary_LV, order_LV, kept_LV, axis=1)
    return np.log(mass_L), in_vocabulary_LV


async def measured(
    client: SglangClient, model: Path, rollout: RolloutConfig, folder: Path
) -> Identity:
    """Draw, score on the same server at the rollout temperature, and compute the default loss, as a run does."""
    name = f"{rollout.temperature}-{rollout.top_p}-{rollout.min_p}"
    pool = ServerPool("self", [client], return_timeout_s=5, say=print)
    pool.admit(client, (await client.model_info()).weight_version)
    try:
        rollouts: list[Rollout] = []
        for number, ids in enumerate(PROMPTS):
            prompt = Prompt(f"p{number}", ids, "", None, None, "")
            sample_ids = [f"{name}-p{number}@0#{i}" for i in range(4)]
            rollouts += await generate_group(pool, prompt, sampling_of(rollout), sample_ids, 0)
        routes = ["self"] * len(rollouts)
        temperatures = {"self": rollout.temperature}
        scores = await score_rollouts(
            {"self": pool}, rollouts, routes, topk=VOCAB, temperatures=temperatures
        )
    finally:
        await pool.close()
    path = folder / f"{name}.safetensors"
    samples = [Sample(one, score) for one, score in zip(rollouts, scores, strict=True)]
    write_batch(path, 1, 7, samples)
    arrays = batch_arrays(read_whole(path))
    return _loss_of(arrays, rollouts, rollout, model)


def _loss_of(arrays, rollouts: list[Rollout], rollout: RolloutConfig, model: Path) -> Identity:  # type: ignore[no-untyped-def]
    rows = [
        reference_logprobs(model, r.prompt_ids + r.response_ids)[len(r.prompt_ids) - 1 :]
        for r in rollouts
    ]
    # Log-probs at temperature 1 are logits.
    logits = torch.from_numpy(np.concatenate(rows)).float().requires_grad_()
    targets = torch.tensor([token for r in rollouts for token in r.response_ids])
    stats = token_stats(logits, targets, vocab_size=VOCAB, temperature=rollout.temperature)
    plan = make_plan(LossSettings(truncated=rollout.truncates), arrays)
    planned = PlannedTokens(scale_T=plan.scale_N, kept_mass_T=plan.kept_mass_N)
    inputs = TokenInputs(
        arrays.behavior_logprobs_N, arrays.teacher_logprobs_N, plan.mask_N, planned=planned
    )
    made = make_token_loss(LossSettings())(stats, inputs)
    made.loss_sum.backward()
    assert logits.grad is not None
    student = stats.sampled_logprobs_T.detach()
    at_rollout = torch.log_softmax(logits.detach().double() / rollout.temperature, -1).numpy()
    wanted, kept_LV = kept_logmass(at_rollout, rollout)
    seen = (
        np.zeros(len(targets)) if arrays.kept_logmass_N is None else arrays.kept_logmass_N.numpy()
    )
    return Identity(
        kl=float((student - arrays.teacher_logprobs_N).double().mean()),
        masked_frac=float(made.outside_T.float().mean()),
        gradient=float(logits.grad.abs().max()),
        kept_nats=float(np.abs(seen - wanted).max()),
        kept_mass=float(np.exp(wanted).mean()),
        num_tokens=len(targets),
        num_outside=int((~kept_LV[np.arange(len(targets)), targets.numpy()]).sum()),
    )
