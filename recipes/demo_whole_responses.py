"""Two-digit addition, divergence of whole responses: every token is charged with what follows it.

Discount 1 makes the sampled-token gradient that of the divergence between whole responses (docs/losses.md).
Runs on two CPU cores. Not measured here: its accuracy after 60 steps.
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
            "optimizer.lr": 0.0003,
        },
    )
