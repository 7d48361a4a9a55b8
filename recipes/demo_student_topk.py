"""Two-digit addition, student top-K: an advantage for each of the student's 4 most likely tokens, weighted by it.

The setting of "Rethinking On-Policy Distillation" (arXiv 2604.13016) in small, against a served teacher: which tokens
the student finds likely is known only in the learner, so the server is asked for more (docs/decisions/0022).
The expected gradient is not that of a divergence on all tokens, so it needs `allow_biased`.
Measured once on two CPU cores: accuracy 93.0 % from 32 %, with a teacher of 97 %, in 1.5 minutes; KL 0.742 to 0.035.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "objective.estimator": "topk_surrogate",
            "objective.measure": "raw",
            "objective.support": "student_topk",
            "objective.topk": 4,
            "objective.token_weights": "student_p",
            "objective.allow_biased": True,
            "correction.kind": "none",
        },
    )
