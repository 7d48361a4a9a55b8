"""Two-digit addition, supervised: the demo's noisy student learns from written derivations, on two CPU cores.

The cold start before on-policy distillation, in small. Go on from it with
`opd export RUN --out DIR` and `opd run demo student.path=DIR`.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "steps": 48,
            "teachers": {},
            "data.train": "demo/demonstrations.jsonl",
            "objective.divergence": "forward_kl",
            "objective.estimator": "cross_entropy",
            "correction.kind": "none",
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 4,
            "optimizer.min_lr": 1e-5,
            "batch.rollouts_per_prompt": 1,
            "evaluation.every": 24,
            "checkpoint.every": 24,
        },
    )
