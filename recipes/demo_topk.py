"""Two-digit addition, teacher top-K: reverse KL on the teacher's 8 most likely tokens and the mass outside them.

Support matching with a tail bucket, differentiated through the student (docs/losses.md). SGLang servers send the top-K.
Measured once on two CPU cores: accuracy 94.5 % from 32 %, with a teacher of 97 %, in 1.4 minutes; KL 0.742 to 0.029.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "objective.estimator": "support_matching",
            "objective.support": "teacher_topk",
            "objective.topk": 8,
            "objective.measure": "tail_bucket",
            "objective.report_overlap": True,
            "correction.kind": "none",
        },
    )
