"""Two-digit addition, reinforcement and distillation together: a graded answer beside the teacher's scores.

The task advantage is whitened within the four responses to a prompt, as GRPO does; the distillation term is not.
Measured once on two CPU cores: accuracy 91.8 % from 32 %, with a teacher of 97 %, in 1.6 minutes; KL 0.742 to 0.041.
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
