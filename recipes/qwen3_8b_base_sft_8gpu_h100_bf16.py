"""Qwen3-8B-Base is trained on written chains of thought, on 8 H100 GPUs: the cold start before distillation.

Reproduces: the supervised start of "On-Policy Distillation" (Thinking Machines 2025), 400,000 rows of OpenThoughts-3.
Source: https://thinkingmachines.ai/blog/on-policy-distillation; the rate and its schedule are ours.
Expected: AIME24 of 60 % after the 400,000 rows in the source. No server runs here: evaluate the export with
`opd eval qwen3_8b_base_sft_from_qwen3_32b_64gpu_h100_bf16 --model DIR`.
Memory: not run here; planned GiB of a GPU's 75: learner 71.
Speed: not run here; planned 51 s a step (learner 51), 356 GPU-hours.
Prompts: openthoughts3-400k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_8b_base_sft_8gpu_h100_bf16 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.long_chains import long_chains


def recipe() -> Recipe:
    return change(
        long_chains("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-32B", "openthoughts3-400k/train.parquet"),
        {
            "steps": 3125,
            "teachers": {},
            "data.heldout": "",
            "objective.divergence": "forward_kl",
            "objective.estimator": "cross_entropy",
            "correction.kind": "none",
            "optimizer.lr": 1e-05,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 100,
            "batch.prompts_per_step": 128,
            "batch.rollouts_per_prompt": 1,
            "learner.data_parallel": 8,
            "checkpoint.every": 250,
        },
    )
