"""Qwen3-4B-Base learns from Qwen3-32B on 32 GB200 GPUs, learner in bf16.

Reproduces: the reference setting with a larger teacher.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: the site's run_data/oracle_sizes/32b.csv has the published curve, with 2,048 responses a step.
Memory: not run here; planned GiB of a GPU's 173: learner 36, rollout 141, teachers 145.
Speed: not run here; planned 105 s a step (rollout 44, teachers 28, learner 21, rest 11), 749 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_32b_32gpu_gb200_bf16 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-32B"),
        {
            "learner.data_parallel": 8,
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 8,
        },
    )
