"""Two-digit addition, reinforcement and distillation together: a graded answer beside the teacher's scores.

The task advantage is whitened within the four responses to a prompt, as GRPO does; the distillation term is not.
Runs on two CPU cores. Not measured here: its accuracy after 60 steps.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "task.coefficient": 0.5,
            "task.grader": "column_addition",
            "whitening.scope": "group",
            "whitening.of": "task",
            "correction.level": "sequence",
        },
    )
