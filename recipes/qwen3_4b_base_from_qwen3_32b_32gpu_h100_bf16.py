"""Qwen3-4B-Base learns from Qwen3-32B on 32 H100 GPUs, learner in bf16.

Reproduces: the reference setting with a larger teacher.
Source: "On-Policy Distillation Adventures", Table 1 (recipes/families/opd_adventures.py).
Expected: the site's run_data/oracle_sizes/32b.csv has the published curve, with 2,048 responses a step.
Memory, speed: not run here; `opd estimate` says what the model of docs/planner.md expects.
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.opd_adventures import base_from_instruct


def recipe() -> Recipe:
    return change(
        base_from_instruct("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-32B"),
        {
            "learner.data_parallel": 8,
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 4,
            "teachers.main.server.tensor_parallel": 2,
        },
    )
