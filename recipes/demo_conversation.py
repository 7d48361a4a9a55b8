"""Two-digit addition, conversations: who answers wrong is asked again, and both turns are taught.

The environment grades an answer and repeats the question; what it says does not train
(docs/decisions/0027-a-conversation-is-one-sample.md). Evaluation asks once.
Measured once on two CPU cores: accuracy 88.2 % from 32 %, with a teacher of 97 %, in 1.7 minutes; KL 0.742 to 0.037.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "environment.name": "try_again",
            "environment.grader": "column_addition",
            "environment.max_turns": 2,
            "environment.max_observation_tokens": 10,
        },
    )
