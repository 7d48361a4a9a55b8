"""Qwen3-4B-Base learns from Qwen3-14B on 16 GB200 GPUs, learner in bf16.

Reproduces: the reference setting with a larger teacher.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: no published curve of this pair is known to us.
Memory, speed: not run here; `opd estimate` says what the model of docs/planner.md expects.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-14B"),
        {
            "learner.data_parallel": 4,
            "rollout.server.num_servers": 8,
            "teachers.main.server.num_servers": 4,
        },
    )
