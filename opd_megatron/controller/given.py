"""Supervised training in the terms of the loop: the response of a row takes the place of a rollout, and the data that
of a teacher.

A given response is of no weight version, so it counts as one of the version that is trained: it is never stale. Where
a teacher's log-prob stands for other objectives there is 0, the log-prob of the token under the data. Neither that nor
the behavior policy's 0 is read by `cross_entropy`.
"""

from __future__ import annotations

import numpy as np

from opd_megatron.types import Prompt, Rollout, TeacherScores

DATA = "data"


def given_rollout(prompt: Prompt, sample_id: str, version: int) -> Rollout:
    """The response that comes with a prompt."""
    assert prompt.response_ids is not None, "rows were read with their responses"
    return Rollout(
        sample_id=sample_id,
        prompt_id=prompt.id,
        prompt_ids=prompt.token_ids,
        response_ids=prompt.response_ids,
        behavior_logprobs=np.zeros(len(prompt.response_ids), np.float32),
        finish_reason="stop",
        version_first=version,
        version_last=version,
        server=DATA,
    )


def given_scores(rollout: Rollout) -> TeacherScores:
    """What the data says of its own response: every token is certain."""
    return TeacherScores(DATA, np.zeros(len(rollout.response_ids), np.float32))
