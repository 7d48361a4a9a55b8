"""Qwen3-4B-Base learns from Qwen3-4B on 16 GB200 GPUs, learner in bf16, squared Hellinger distance.

Reproduces: advantages of the squared Hellinger distance in place of the reverse KL.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: 0.3 points of mean@8 over the reference in the source.
Memory, speed: not run here; `opd estimate` says what the model of docs/planner.md expects.
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
            "objective.divergence": "squared_hellinger",
        },
    )
