"""Two-digit addition, supervised: the demo's noisy student learns from written derivations, on two CPU cores.

Shows: the cold start before on-policy distillation: cross-entropy on given responses in the same learner.
Source: "Rethinking On-Policy Distillation" (arXiv 2604.13016) proposes such a start.
Expected: accuracy 31.6 % to 84.4 %.
Memory: 1.4 GiB over all processes, measured once.
Speed: 0.09 s a step, 19 s in all, measured once on two CPU cores.
Look at: train/cross_entropy, whose floor is the entropy of the data.
Run: `opd run demo_sft`, then `opd export RUN --out DIR` and `opd run demo student.path=DIR`
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
