"""Two-digit addition, squared Hellinger distance from the sampled token instead of the reverse KL.

Advantages are -f'(pi/q) of the divergence; `opd objectives` lists the others (Tsallis, alpha, Jensen-Shannon, ...).
Runs on two CPU cores. Not measured here: its accuracy after 60 steps.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "objective.divergence": "squared_hellinger",
        },
    )
