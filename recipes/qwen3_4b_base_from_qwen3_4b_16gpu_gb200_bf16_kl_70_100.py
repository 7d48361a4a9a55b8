"""Qwen3-4B-Base learns from Qwen3-4B on 16 GB200 GPUs, learner in bf16, only the 30 % of tokens with the largest KL.

Reproduces: the token filter KL 70-100 of the source. It chooses by the token that it trains, which tilts the
expected gradient, so it needs `allow_biased`; student_entropy does not.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: mean@8 20.3, best@8 33.8 at the end, best@8 37.5 at its best, in the source.
Memory: not run here; planned GiB of a GPU's 173: learner 42, rollout 141, teachers 145.
Speed: not run here; planned 140 s a step (rollout 75, teachers 8, learner 43, rest 14), 502 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16_kl_70_100 --cluster SITE`
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
            "filter.score": "kl",
            "filter.low": 70.0,
            "filter.high": 100.0,
            "objective.allow_biased": True,
        },
    )
