"""Exporting runs a learner of one rank, whatever layout the run had."""

from __future__ import annotations

from opd_megatron.config.rules import problems
from opd_megatron.config.schema import LearnerConfig, Recipe
from opd_megatron.launch.export import on_one_rank


def test_a_run_in_any_layout_is_exported_by_one_rank() -> None:
    learner = LearnerConfig(
        tensor_parallel=2,
        pipeline_parallel=2,
        virtual_pipeline=2,
        context_parallel=2,
        data_parallel=2,
        sequence_parallel=True,
        distributed_optimizer=True,
    )
    recipe = Recipe(learner=learner)
    alone = on_one_rank(recipe)
    assert alone.learner.world_size == 1
    assert [line for line in problems(alone) if line.startswith("learner.")] == []
    assert alone.student == recipe.student and alone.optimizer == recipe.optimizer
