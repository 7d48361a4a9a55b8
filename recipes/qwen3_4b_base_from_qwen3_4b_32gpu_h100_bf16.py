"""Qwen3-4B-Base learns from Qwen3-4B on 32 H100 GPUs, learner in bf16.

Reproduces: the reference setting.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: mean@8 21.4 at its best and 18.4 at the end, best@8 32.4 at the end (from 7.9 and 18.5),
teacher KL 0.39 to 0.04 nats, with 2,048 responses a step (the site's run_data/vanilla.csv).
Memory: not run here; planned GiB of a GPU's 75: learner 36, rollout 62, teachers 66.
Speed: not run here; planned 185 s a step (rollout 105, teachers 10, learner 54, rest 15), 1,324 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_4b_32gpu_h100_bf16 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B"),
        {
            "learner.data_parallel": 8,
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 8,
        },
    )
