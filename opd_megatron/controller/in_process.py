"""What the controller asks the learner about the teachers inside it: how far is the student from one here?

The answer is exact for any vocabulary, because the learner holds both distributions. Such a teacher
writes nothing and has no server: its own accuracy can not be measured, and is never made up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.teacher.in_process import unscored
from opd_megatron.types import Rollout, Sample

Values = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class LearnerTeachers:
    """The teachers inside the learner.

    folder: for the batch and the answer; both are removed again.
    """

    link: LearnerLink
    folder: Path

    async def compare(self, teacher: str, rollouts: Sequence[Rollout]) -> Values:
        """[sum L] each, in the order of `rollouts`; the names are those of `megatron/compare.py`.

        Raises:
            OpdError: from the learner.
        """
        batch, out = (self.folder / f"compare{end}.safetensors" for end in ("", ".tokens"))
        samples = [Sample(rollout, unscored(rollout, teacher)) for rollout in rollouts]
        version = max((rollout.version_last for rollout in rollouts), default=0)
        await asyncio.to_thread(write_batch, batch, version + 1, version, samples)
        await self.link.ask("compare", batch=str(batch), out=str(out))
        values = await asyncio.to_thread(load_file, out)
        batch.unlink()
        out.unlink()
        return values


def mean(values_N: NDArray[np.float32]) -> float:
    """Over all tokens, in float64; 0.0 when there is none."""
    return float(values_N.astype(np.float64).mean()) if len(values_N) else 0.0
