"""Qwen3-1.7B-Base learns from a Qwen3-4B-Base trained by GRPO on 8 H100 GPUs: the student's top 16.

Reproduces: the default of "Rethinking On-Policy Distillation": reverse KL as an advantage of each of the
student's top 16, weighted by the student. The teacher is inside the learner: a server can not score them.
Source: arXiv 2604.13016, https://github.com/thunlp/OPD (on_policy_distillation.sh): DAPO-Math-17k, 64 prompts x 4
responses of 7,168 tokens, learning rate 1e-6. The expected gradient is not that of a divergence on all tokens, so it
needs `allow_biased`.
Expected: gap recovery 16.9 % to 58.6 % with such a teacher in the source; no single score is quoted.
Memory, speed: not run here; `opd estimate` says what the model of docs/planner.md expects.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.long_chains import long_chains


def recipe() -> Recipe:
    return change(
        long_chains(
            "Qwen/Qwen3-1.7B-Base", "lllyx/Qwen3-4B-Base-GRPO", "dapo-math-17k/train.parquet"
        ),
        {
            "objective.estimator": "topk_surrogate",
            "objective.measure": "raw",
            "objective.support": "student_topk",
            "objective.topk": 16,
            "objective.token_weights": "student_p",
            "objective.allow_biased": True,
            "rollout.max_new_tokens": 7168,
            "rollout.server.context_length": 8193,
            "rollout.server.num_servers": 4,
            "batch.tokens_per_microbatch": 8192,
            "learner.data_parallel": 4,
            "teachers.main.engine": "in_process",
        },
    )
