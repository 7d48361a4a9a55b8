"""Qwen3-1.7B-Base learns from Qwen3-32B on 32 H100 GPUs, learner in bf16.

Reproduces: the reference setting with other models.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: not published for this pair.
Memory: not run here; planned GiB of a GPU's 75: learner 19, rollout 62, teachers 66.
Speed: not run here; planned 173 s a step (rollout 71, teachers 71, learner 22, rest 9), 1,241 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_1_7b_base_from_qwen3_32b_32gpu_h100_bf16 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-32B"),
        {
            "learner.data_parallel": 8,
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 4,
            "teachers.main.server.tensor_parallel": 2,
        },
    )
