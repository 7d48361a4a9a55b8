"""Two-digit addition, squared Hellinger distance from the sampled token instead of the reverse KL.

Advantages are -f'(pi/q) of the divergence; `opd objectives` lists the others (Tsallis, alpha, Jensen-Shannon, ...).
Measured once on two CPU cores: accuracy 91.3 % from 32 %, with a teacher of 97 %, in 1.4 minutes; KL 0.742 to 0.058.
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
