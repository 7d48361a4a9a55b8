"""Qwen3-4B-Base learns from Qwen3-14B on 16 GB200 GPUs, learner in MXFP8.

Reproduces: the reference setting with a larger teacher.
The low precision is ours: the source trained in bf16. The output head stays in bf16.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: no published curve of this pair is known to us.
Memory: not run here; planned GiB of a GPU's 173: learner 49, rollout 141, teachers 145.
Speed: not run here; planned 142 s a step (rollout 75, teachers 24, learner 29, rest 14), 509 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_14b_16gpu_gb200_mxfp8 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-14B"),
        {
            "learner.data_parallel": 4,
            "learner.precision": "fp8",
            "learner.fp8_recipe": "mxfp8",
            "rollout.server.num_servers": 8,
            "teachers.main.server.num_servers": 4,
        },
    )
