"""Qwen3-8B after supervised training learns from Qwen3-32B on 64 H100 GPUs, responses of 16,384 tokens.

Reproduces: the mathematics experiment of "On-Policy Distillation" (Thinking Machines 2025), 512 prompts x 4 a step.
Source: https://thinkingmachines.ai/blog/on-policy-distillation. It trained a LoRA of rank 128 at 1e-4; here all weights
are trained at 1e-6, the rate of slime's script for this pair. A footnote there names Qwen3-8B as the actual teacher.
Expected: AIME24 60 % to 70 % in about 150 steps in the source. The student is what
`opd export` makes of a run of qwen3_8b_base_sft_8gpu_h100_bf16, put into a folder of OPD_MODELS.
Memory: not run here; planned GiB of a GPU's 75: learner 66, rollout 62, teachers 66.
Speed: not run here; planned 1,447 s a step (rollout 798, teachers 188, learner 411, rest 51), 3,859 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_8b_base_sft_from_qwen3_32b_64gpu_h100_bf16 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.long_chains import long_chains
from recipes.families.opd_adventures import BASE_ENDS_AS_INSTRUCT


def recipe() -> Recipe:
    return change(
        long_chains("Qwen3-8B-Base-SFT", "Qwen/Qwen3-32B", "deepmath-103k/train.parquet"),
        {
            "steps": 150,
            "batch.prompts_per_step": 512,
            "learner.data_parallel": 16,
            "rollout.server.num_servers": 32,
            "teachers.main.aliases": BASE_ENDS_AS_INSTRUCT,
            "teachers.main.server.num_servers": 8,
            "teachers.main.server.tensor_parallel": 2,
        },
    )
