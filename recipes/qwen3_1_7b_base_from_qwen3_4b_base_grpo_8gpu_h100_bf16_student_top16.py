"""Qwen3-1.7B-Base learns from a Qwen3-4B-Base trained by GRPO on 8 H100 GPUs: the student's top 16.

Reproduces: the default of "Rethinking On-Policy Distillation": reverse KL as an advantage of each of the
student's top 16, weighted by the student. The teacher is inside the learner, which needs no requests.
Source: arXiv 2604.13016, https://github.com/thunlp/OPD (on_policy_distillation.sh): DAPO-Math-17k, 64 prompts x 4
responses of 7,168 tokens, learning rate 1e-6.
Expected: with such a teacher, gap recovery of 16.9 % and 58.6 % in two settings of the source; no score is quoted.
Memory: not run here; planned GiB of a GPU's 75: learner 29, rollout 62.
Speed: not run here; planned 168 s a step (rollout 101, learner 31, rest 36), 75 GPU-hours.
Prompts: dapo-math-17k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_1_7b_base_from_qwen3_4b_base_grpo_8gpu_h100_bf16_student_top16 --cluster SITE`
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
            "rollout.max_new_tokens": 7168,
            "rollout.server.context_length": 8193,
            "rollout.server.num_servers": 4,
            "batch.tokens_per_microbatch": 8192,
            "learner.data_parallel": 4,
            "teachers.main.engine": "in_process",
        },
    )
