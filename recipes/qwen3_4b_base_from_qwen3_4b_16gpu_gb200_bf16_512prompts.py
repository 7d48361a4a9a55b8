"""Qwen3-4B-Base learns from Qwen3-4B on 16 GB200 GPUs, learner in bf16, 512 prompts a step.

Reproduces: the default run as its published logs show it: 512 prompts x 4, 201 steps, one epoch.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: mean@8 21.4 at its best and 18.4 at the end, best@8 32.4 at the end (from 7.9 and 18.5),
teacher KL 0.39 to 0.04 nats, with 2,048 responses a step (the site's run_data/vanilla.csv).
Memory: not run here; planned GiB of a GPU's 173: learner 42, rollout 141, teachers 145.
Speed: not run here; planned 496 s a step (rollout 266, teachers 29, learner 171, rest 31), 443 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16_512prompts --cluster SITE`
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
            "batch.prompts_per_step": 512,
            "steps": 201,
            "evaluation.every": 10,
            "checkpoint.every": 10,
        },
    )
