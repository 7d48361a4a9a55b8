"""Two-digit addition, token filter: only the 30 % of tokens with the largest log-ratio train.

The filter KL 70-100 of "On-Policy Distillation Adventures", in small; percentiles are of the whole step batch.
It chooses by the token that it trains, which tilts the expected gradient, so it needs `allow_biased`.
Measured once on two CPU cores: accuracy 90.8 % from 32 %, with a teacher of 97 %, in 1.4 minutes; KL 0.742 to 0.045.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "filter.score": "kl",
            "filter.low": 70.0,
            "filter.high": 100.0,
            "objective.allow_biased": True,
        },
    )
