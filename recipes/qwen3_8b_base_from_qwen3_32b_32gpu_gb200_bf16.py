"""Qwen3-8B-Base learns from Qwen3-32B on 32 GB200 GPUs, learner in bf16.

Reproduces: the reference setting with other models.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: not published for this pair.
Memory, speed: not run here; `opd estimate` says what the model of docs/planner.md expects.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-32B"),
        {
            "learner.data_parallel": 8,
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 8,
        },
    )
