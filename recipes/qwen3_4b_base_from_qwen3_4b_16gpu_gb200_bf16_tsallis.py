"""Qwen3-4B-Base learns from Qwen3-4B on 16 GB200 GPUs, learner in bf16, Tsallis divergence.

Reproduces: advantages of a Tsallis divergence in place of the reverse KL; its order 0.5 is our choice.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: 0.3 points of mean@8 over the reference in the source.
Memory: not run here; planned GiB of a GPU's 173: learner 42, rollout 141, teachers 145.
Speed: not run here; planned 140 s a step (rollout 75, teachers 8, learner 43, rest 14), 502 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16_tsallis --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B"),
        {
            "learner.data_parallel": 4,
            "rollout.server.num_servers": 8,
            "teachers.main.server.num_servers": 4,
            "objective.divergence": "tsallis",
            "objective.alpha": 0.5,
        },
    )
