"""Two-digit addition, divergence of whole responses: every token is charged with what follows it.

Discount 1 makes the sampled-token gradient that of the divergence between whole responses (docs/losses.md).
Measured once on two CPU cores: accuracy 89.3 % from 34 %, with a teacher of 97 %, in 2.1 minutes; KL 0.696 to 0.040.
With a third of the learning rate 81.1 %.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "objective.discount": 1.0,
            "correction.level": "sequence",
        },
    )
