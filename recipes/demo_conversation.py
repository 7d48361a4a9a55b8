"""Two-digit addition, conversations: who answers wrong is asked again, and both turns are taught.

Shows: an environment with two turns. It grades the answer and repeats the question; both turns are taught, what the
environment says does not train (docs/decisions/0027-a-conversation-is-one-sample.md).
Source: ours. One of your own is a file in opd_megatron/environments/ and a line of its catalog.
Expected: accuracy 31.6 % to 86.0 % (teacher 96.6 %), KL(student || teacher) 0.742 to 0.059 nats a token.
Evaluation asks once, so this is the accuracy of first answers.
Memory: 2.2 GiB over all processes, measured once.
Speed: 1.31 s a step, 104 s in all, measured once on two CPU cores.
Look at: rollout/turns_mean; the responses in the report, where both turns stand.
Run: `opd run demo_conversation`
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
