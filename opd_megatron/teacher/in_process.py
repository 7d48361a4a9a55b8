"""Samples whose teacher is inside the learner travel without scores; the learner finds them itself.

The places of the scores hold NaN, and id -1 in a top-K that the other samples of the batch carry: a
score that was forgotten stops the step by its name instead of training on a number.
"""

from __future__ import annotations

import numpy as np

from opd_megatron.types import Rollout, TeacherScores


def unscored(rollout: Rollout, teacher: str, topk: int = 0) -> TeacherScores:
    """The places of a rollout's scores.

    Args:
        teacher: its name.
        topk: K of the batch; 0 where the batch has no top-K.
    """
    length = len(rollout.response_ids)
    nothing = np.full(length, np.nan, dtype=np.float32)
    if topk == 0:
        return TeacherScores(teacher, nothing)
    return TeacherScores(
        teacher,
        nothing,
        np.full((length, topk), -1, dtype=np.int32),
        np.full((length, topk), np.nan, dtype=np.float32),
    )
