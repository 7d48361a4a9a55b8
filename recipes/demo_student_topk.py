"""Two-digit addition, student top-K: an advantage for each of the student's 4 most likely tokens, weighted by it.

Shows: the student chooses which tokens are compared, against a served teacher. The student's top 4 come with its
rollout; the teacher would not list them by itself, so it is asked for more (docs/teachers.md).
Source: the setting of "Rethinking On-Policy Distillation" (arXiv 2604.13016), there with the top 16.
Expected: accuracy 31.6 % to 90.2 % (teacher 96.6 %), KL(student || teacher) 0.742 to 0.035 nats a token.
Memory: 2.2 GiB over all processes, measured once.
Speed: 1.33 s a step, 106 s in all, measured once on two CPU cores.
Look at: train/support_student_mass, what the 4 tokens hold of the student's probability.
At scale: qwen3_1_7b_base_from_qwen3_4b_base_grpo_8gpu_h100_bf16_student_top16
Run: `opd run demo_student_topk`
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
            "correction.kind": "none",
        },
    )
