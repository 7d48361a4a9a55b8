"""Qwen3-4B-Base learns from Qwen3-4B on 16 GB200 GPUs, learner in bf16, responses of 16,384 tokens.

Reproduces: the 16k-response variant of the reference setting.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: mean@8 29.3, best@8 47.3 at the end of the published run, with 2,048 responses a step (the site's run_data).
Memory: not run here; planned GiB of a GPU's 173: learner 46, rollout 141, teachers 145.
Speed: not run here; planned 428 s a step (rollout 273, teachers 20, learner 105, rest 31), 1,531 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16_16k --cluster SITE`
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
            "rollout.max_new_tokens": 16384,
            "rollout.server.context_length": 17409,
            "teachers.main.server.context_length": 17409,
            "batch.tokens_per_microbatch": 17408,
        },
    )
