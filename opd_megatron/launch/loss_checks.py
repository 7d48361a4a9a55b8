"""Whether the loss of a recipe is what it says and can be fed: checked before anything starts. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from opd_megatron.config.schema import Recipe, TeacherConfig
from opd_megatron.data.rows import RowScan
from opd_megatron.environments.catalog import environment_maker
from opd_megatron.errors import ConfigError, DataError
from opd_megatron.eval.grading import make_grader
from opd_megatron.losses.catalog import Objective
from opd_megatron.losses.combinations import check_in_process, check_served, check_settings
from opd_megatron.losses.settings import LossSettings
from opd_megatron.teacher.aliases import resolve_aliases


def check_loss(recipe: Recipe) -> Objective:
    """The row of the catalog that a recipe's objective is.

    Raises:
        ConfigError: a combination that can not be computed, or that is biased without permission.
    """
    settings = LossSettings.of(recipe)
    row = check_settings(settings)
    if recipe.served_teachers:
        check_served(settings, tuple(recipe.served_teachers))
    if recipe.in_process_teachers:
        check_in_process(settings)
    learner = recipe.learner
    if settings.student_topk and learner.loss_mode in ("chunked", "recompute"):
        raise ConfigError.of(
            "learner.loss_mode",
            learner.loss_mode,
            f"keeps no logits, and objective.support={recipe.objective.support} needs the student's top-K of them",
            "set learner.loss_mode=in_place",
        )
    if settings.has_full_support and learner.loss_mode == "recompute":
        raise ConfigError.of(
            "learner.loss_mode",
            learner.loss_mode,
            "has no form over the whole vocabulary",
            "set learner.loss_mode=chunked, which keeps no logits either, or in_place",
        )
    if learner.loss_backend == "triton" and recipe.device == "cpu":
        raise ConfigError.of(
            "learner.loss_backend",
            "triton",
            "runs on CUDA, and device=cpu",
            "set learner.loss_backend=auto",
        )
    if not recipe.objective.allow_biased:
        for name, teacher in recipe.teachers.items():
            _check_temperatures(recipe.rollout.temperature, name, teacher)
    return row


def _check_temperatures(rollout: float, name: str, teacher: TeacherConfig) -> None:
    if rollout == teacher.temperature:
        return
    raise ConfigError.of(
        "rollout.temperature",
        rollout,
        f"the student's log-probs in the loss are at this temperature, those of teacher {name} at "
        f"teachers.{name}.temperature={teacher.temperature:g}: the student would learn to be the teacher only when the "
        "two are sampled at these temperatures",
        f"set both to one value (one other than 1 needs the whole distribution of the teacher: "
        f"teachers.{name}.engine=in_process), or objective.allow_biased=true if that is what you want",
    )


def check_aliases(recipe: Recipe) -> None:
    """
    Raises:
        ConfigError: an alias names a token that the tokenizer does not have.
    """
    for name, teacher in recipe.teachers.items():
        resolve_aliases(teacher.aliases, Path(recipe.student.path), name)


def check_environment(recipe: Recipe, train: RowScan) -> None:
    """
    Raises:
        ConfigError: no such grader.
        DataError: a training prompt without an answer, which the environment grades.
    """
    if recipe.environment.name == "none":
        return
    environment_maker(recipe.environment)
    for row in train.rows:
        if row.answer is None:
            raise DataError(
                f"data.train={str(train.path)!r}: {row.source} has no {recipe.data.answer_key!r}, and "
                f"environment.name={recipe.environment.name} grades every turn; add it, set data.answer_key, or set "
                f"environment.name=none"
            )


def check_task(recipe: Recipe, train: RowScan) -> None:
    """
    Raises:
        ConfigError: no such grader.
        DataError: a task term, and a training prompt without an answer to grade.
    """
    if recipe.task.coefficient == 0.0:
        return
    make_grader(recipe.task.grader, "task.grader")
    for row in train.rows:
        if row.answer is None:
            raise DataError(
                f"data.train={str(train.path)!r}: {row.source} has no {recipe.data.answer_key!r}, and "
                f"task.coefficient={recipe.task.coefficient:g} grades every response; add it, set "
                f"data.answer_key, or set task.coefficient=0"
            )
