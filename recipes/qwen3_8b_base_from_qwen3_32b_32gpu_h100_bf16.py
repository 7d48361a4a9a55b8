"""Qwen3-8B-Base learns from Qwen3-32B on 32 H100 GPUs, learner in bf16.

Reproduces: the reference setting with other models.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: not published for this pair.
Memory: not run here; planned GiB of a GPU's 75: learner 67, rollout 62, teachers 66.
Speed: not run here; planned 324 s a step (rollout 137, teachers 71, learner 91, rest 25), 2,315 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_8b_base_from_qwen3_32b_32gpu_h100_bf16 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-32B"),
        {
            "learner.data_parallel": 8,
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 4,
            "teachers.main.server.tensor_parallel": 2,
        },
    )
