"""Two-digit addition, whole vocabulary: the teacher is a second Megatron model inside the learner.

Every token of the vocabulary enters the divergence, without a K and without a teacher server (docs/losses.md).
Runs on two CPU cores. Not measured here: its accuracy after 60 steps.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "teachers.main.engine": "in_process",
            "objective.estimator": "support_matching",
            "objective.support": "full",
            "correction.kind": "none",
        },
    )
