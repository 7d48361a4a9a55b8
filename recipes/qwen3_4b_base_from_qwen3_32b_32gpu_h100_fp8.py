"""Qwen3-4B-Base learns from Qwen3-32B on 32 H100 GPUs, learner in FP8 (current scaling).

Reproduces: the reference setting with a larger teacher.
The low precision is ours: the source trained in bf16. The output head stays in bf16.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: the site's run_data/oracle_sizes/32b.csv has the published curve, with 2,048 responses a step.
Memory: not run here; planned GiB of a GPU's 75: learner 44, rollout 62, teachers 66.
Speed: not run here; planned 221 s a step (rollout 105, teachers 71, learner 29, rest 15), 1,584 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_32b_32gpu_h100_fp8 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-32B"),
        {
            "learner.data_parallel": 8,
            "learner.precision": "fp8",
            "learner.fp8_recipe": "current",
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 4,
            "teachers.main.server.tensor_parallel": 2,
        },
    )
