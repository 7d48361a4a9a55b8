"""Rollouts of several turns: the student and an environment write in turns, and it all becomes one sample.

    prompt | turn 1 | observation | turn 2 | ...      one sequence, scored by the teacher in one prefill
             trains   read, masked   trains

Every turn is a request of its own that begins with all tokens so far. It goes to the server of the turn before, whose
prefix cache holds them. Tokens are never read back from text: what the student wrote stays as it was sampled, and an
observation is what the chat template writes between two of its turns. A turn that is cut at `rollout.max_new_tokens`
ends the episode, because the student has not given up its turn.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import numpy as np

from opd_megatron.config.schema import EnvironmentConfig, Recipe
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.environments.catalog import environment_maker
from opd_megatron.errors import ContractError
from opd_megatron.serving.contract import Generation
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.teacher.scoring import all_or_first_error
from opd_megatron.types import Prompt, Rollout


class Episode:
    """The tokens of one conversation while it grows."""

    def __init__(self, prompt: Prompt, sample_id: str, num_control: int = 0) -> None:
        self.prompt, self.sample_id, self.num_control = prompt, sample_id, num_control
        self.ids: list[int] = []
        self.given: list[tuple[int, int]] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._kept: list[float] = []
        self._last: Generation | None = None

    def add_turn(self, generation: Generation) -> None:
        """
        Raises:
            ContractError: it was written by older weights than the turn before.
        """
        if self._versions and generation.version_first < self._versions[-1]:
            raise ContractError(
                f"sample {self.sample_id}: a turn by weight version {generation.version_first} after one by "
                f"{self._versions[-1]}"
            )
        self.ids += generation.token_ids
        self._logprobs += generation.logprobs.tolist()
        self._versions += generation.token_versions.tolist()
        kept = generation.kept_logmass
        self._kept += [0.0] * len(generation.token_ids) if kept is None else kept.tolist()
        self._last = generation

    def add_observation(self, ids: Sequence[int]) -> None:
        """What the environment wrote. It counts as of the version before it, whose turn it answers."""
        self.given.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self._logprobs += [0.0] * len(ids)
        self._kept += [0.0] * len(ids)
        self._versions += self._versions[-1:] * len(ids)

    @property
    def server(self) -> str:
        """Of the turn before; empty before the first."""
        return "" if self._last is None else self._last.server

    def to_rollout(self, reward: float) -> Rollout:
        last, versions = self._last, self._versions
        assert last is not None, "an episode has a turn"
        ends = [i for i, (a, b) in enumerate(itertools.pairwise(versions), start=1) if a != b]
        spans = tuple((versions[end - 1], end) for end in [*ends, len(versions)])
        return Rollout(
            sample_id=self.sample_id,
            prompt_id=self.prompt.id,
            prompt_ids=self.prompt.token_ids,
            response_ids=tuple(self.ids),
            behavior_logprobs=np.asarray(self._logprobs, np.float32),
            finish_reason=last.finish_reason,
            version_first=versions[0],
            version_last=versions[-1],
            server=last.server,
            num_control=self.num_control,
            kept_logmass=None if last.kept_logmass is None else np.asarray(self._kept, np.float32),
            spans=spans if len(spans) > 1 else (),
            given=tuple(self.given),
            reward=reward,
        )


class Conversations:
    """Plays the episodes of a run; what they share is made once."""

    def __init__(self, tokenizer: ChatTokenizer, config: EnvironmentConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._new_environment = environment_maker(config)

    async def generate(
        self,
        servers: ServerPool,
        prompt: Prompt,
        sampling: Sampling,
        sample_ids: Sequence[str],
        attempt: int,
        num_control: int = 0,
    ) -> tuple[Rollout, ...]:
        """One episode per sample id for one prompt, whose first `num_control` tokens are a control text, at once.

        Raises:
            RequestRefused: a server calls a conversation wrong.
            ContractError: an answer, or an observation, that can not be used; nothing of the group is kept.
            ServerError: no server can be used.
        """
        episodes = (
            self._play(servers, Episode(prompt, sample_id, num_control), sampling, attempt)
            for sample_id in sample_ids
        )
        return tuple(await all_or_first_error(episodes))

    async def _play(
        self, servers: ServerPool, episode: Episode, sampling: Sampling, attempt: int
    ) -> Rollout:
        environment, max_turns = self._new_environment(), self._config.max_turns
        environment.reset(episode.prompt)
        reward = 0.0
        for turn in range(1, max_turns + 1):
            so_far = (*episode.prompt.token_ids, *episode.ids)
            name = f"{episode.sample_id}/{attempt}/turn{turn}"
            (generation,) = await servers.generate(
                [so_far], sampling, [name], stay_with=episode.server
            )
            episode.add_turn(generation)
            if generation.finish_reason == "length":
                break
            text = self._tokenizer.decode_response(generation.token_ids)
            step = await asyncio.to_thread(environment.step, text)
            reward = step.reward
            if not step.messages or turn == max_turns:
                break
            episode.add_observation(
                _observed(self._tokenizer, step.messages, episode, self._config)
            )
        return episode.to_rollout(reward)


def conversations_of(recipe: Recipe, tokenizer: ChatTokenizer) -> Conversations | None:
    """None where a response is one turn.

    Raises:
        ConfigError: no such environment, or something that it needs is missing.
    """
    environment = recipe.environment
    return None if environment.name == "none" else Conversations(tokenizer, environment)


def _observed(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, str]],
    episode: Episode,
    config: EnvironmentConfig,
) -> tuple[int, ...]:
    where = f"environment {config.name}, sample {episode.sample_id}"
    try:
        ids = tokenizer.encode_observation(messages)
    except ValueError as error:
        raise ContractError(f"{where}: {error}") from error
    if len(ids) > config.max_observation_tokens:
        raise ContractError(
            f"{where}: an observation of {len(ids)} tokens, environment.max_observation_tokens="
            f"{config.max_observation_tokens}"
        )
    return ids
