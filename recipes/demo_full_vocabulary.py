"""Two-digit addition, whole vocabulary: the teacher is a second Megatron model inside the learner.

Shows: an exact divergence. Every token of the vocabulary enters it, without a K and without a teacher server; the
logits of both models stay in their shards (docs/losses.md).
Source: GKD (arXiv 2306.13649); MiniLLM (arXiv 2306.08543) for its single-step term.
Expected: accuracy 31.6 % to 94.3 %, KL(student || teacher) 0.742 to 0.015 nats a token.
Memory: 1.6 GiB over all processes, measured once.
Speed: 0.91 s a step, 74 s in all, measured once on two CPU cores.
Look at: teacher/entropy, exact here, beside train/entropy of the student.
Run: `opd run demo_full_vocabulary`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "teachers.main.engine": "in_process",
            "objective.estimator": "support_matching",
            "objective.support": "full",
            "correction.kind": "none",
        },
    )
