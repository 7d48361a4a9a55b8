"""One group of rollouts and its teacher scores: prompt in, samples out."""

from __future__ import annotations

from collections.abc import Sequence

from opd_megatron.config.schema import RolloutConfig
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.types import Prompt, Rollout


def sampling_of(rollout: RolloutConfig) -> Sampling:
    """The one definition of how the student is sampled in training."""
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        max_new_tokens=rollout.max_new_tokens,
        with_kept_mass=rollout.truncates,
    )


async def generate_group(
    servers: ServerPool,
    prompt: Prompt,
    sampling: Sampling,
    sample_ids: Sequence[str],
    attempt: int,
    topk: int = 0,
    num_control: int = 0,
) -> tuple[Rollout, ...]:
    """One rollout per sample id for one prompt, in one request; with the student's top-K if wanted.

    Raises:
        RequestRefused: the server calls the prompt wrong.
        ContractError: an answer that can not be used; nothing of the group is kept.
        ServerError: no server can be used.
    """
    generations = await servers.generate(
        [prompt.token_ids] * len(sample_ids), sampling, [f"{s}/{attempt}" for s in sample_ids], topk
    )
    return tuple(
        Rollout(
            sample_id=sample_id,
            prompt_id=prompt.id,
            prompt_ids=prompt.token_ids,
            response_ids=generation.token_ids,
            behavior_logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            version_first=generation.version_first,
            version_last=generation.version_last,
            server=generation.server,
            num_control=num_control,
            topk_ids=generation.topk_ids,
            kept_logmass=generation.kept_logmass,
            spans=generation.spans,
        )
        for sample_id, generation in zip(sample_ids, generations, strict=True)
    )
