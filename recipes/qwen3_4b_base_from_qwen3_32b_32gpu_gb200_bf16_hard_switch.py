"""Qwen3-4B-Base learns from Qwen3-4B, 8B, 14B, then 32B on 32 GB200 GPUs: a quarter of the run each.

Reproduces: the hard switch between teachers of growing size, the best ensemble of the source.
Source: "On-Policy Distillation Adventures", section 6 (recipes/families/opd_adventures.py).
Expected: 1.3 points of mean@8 and 3.6 of best@8 over the reference in the source.
Memory: not run here; planned GiB of a GPU's 173: learner 36, rollout 141, teachers 145.
Speed: not run here; planned 133 s a step (rollout 44, teachers 56, learner 21, rest 11), 951 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_32b_32gpu_gb200_bf16_hard_switch --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct, instruct_teacher


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B"),
        {
            "teachers": {
                "4b": instruct_teacher("Qwen/Qwen3-4B", num_servers=1),
                "8b": instruct_teacher("Qwen/Qwen3-8B", num_servers=1),
                "14b": instruct_teacher("Qwen/Qwen3-14B", num_servers=2),
                "32b": instruct_teacher("Qwen/Qwen3-32B", num_servers=4),
            },
            "teaching.kind": "hard_switch",
            "teaching.starts": {"4b": 0.0, "8b": 0.25, "14b": 0.5, "32b": 0.75},
            "learner.data_parallel": 8,
            "rollout.server.num_servers": 16,
        },
    )
