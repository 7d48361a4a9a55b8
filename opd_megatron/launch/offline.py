"""What can be checked of a recipe where its models and prompts are not: on a laptop, a login node, in CI.

A model that is not here is taken from the table of published models. Of each teacher: layout, context, number of
embedding rows and end tokens against the student's. Not checked, and said so: tokenizer files, prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.schema import Recipe, TeacherConfig
from opd_megatron.errors import ConfigError
from opd_megatron.eval.grading import make_grader
from opd_megatron.launch.contracts import check_vocabulary_uses
from opd_megatron.launch.gpus import check_named_hardware
from opd_megatron.launch.loss_checks import check_loss
from opd_megatron.launch.preflight import read_model_config
from opd_megatron.megatron.architecture import (
    Architecture,
    architecture_of,
    check_layout,
    check_teacher,
)
from opd_megatron.megatron.known_models import PUBLISHED, KnownModel, known_model
from opd_megatron.megatron.layout import check_micro_batch
from opd_megatron.megatron.precision import fp8_settings
from opd_megatron.teacher.routes import route_of


@dataclass(frozen=True)
class ModelFacts:
    """One model of a recipe: from its files, or from the table. `context` 0 and no `end_tokens`: not known."""

    name: str
    architecture: Architecture
    context: int
    end_tokens: tuple[str, ...]
    is_here: bool


def model_facts(path: str, key: str) -> ModelFacts:
    """What a recipe's model is.

    Raises:
        ConfigError: not on this machine and not in the table, or an architecture that is not built here.
    """
    directory = Path(path)
    if directory.is_dir():
        config = read_model_config(directory, key)
        context = config.get("max_position_embeddings")
        architecture = architecture_of(config, str(directory / "config.json"))
        return ModelFacts(path, architecture, context if isinstance(context, int) else 0, (), True)
    known: KnownModel = known_model(path, key)
    config, _ = PUBLISHED[known.architecture]
    return ModelFacts(path, architecture_of(config, path), known.context, known.end_tokens, False)


def check_offline(recipe: Recipe) -> list[str]:
    """Everything that needs no file that is not here.

    Returns:
        what was not checked, in words.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    check_loss(recipe)
    student = model_facts(recipe.student.path, "student.path")
    check_layout(student.architecture, recipe.learner)
    fp8_settings(student.architecture.num_layers, recipe.learner)
    check_named_hardware(recipe)
    _check_context(student, "student.path", recipe)
    check_micro_batch(recipe)
    check_vocabulary_uses(recipe, student.architecture.vocab_size)
    route_of(recipe, student.architecture.vocab_size)
    missing = [] if student.is_here else [student.name]
    for name, config in recipe.teachers.items():
        teacher = model_facts(config.path, f"teachers.{name}.path")
        _check_context(teacher, f"teachers.{name}.path", recipe)
        if config.engine == "in_process":
            check_teacher(name, teacher.architecture, student.architecture, recipe.learner)
        _check_vocabulary(name, teacher, student)
        _check_ends(name, config, teacher, student)
        missing += [] if teacher.is_here else [teacher.name]
    if recipe.data.heldout:
        make_grader(recipe.evaluation.grader)
    files = [f for f in (recipe.data.train, recipe.data.heldout) if f and not Path(f).is_file()]
    return [
        *(
            f"tokenizer and weights of {name}: not on this machine"
            for name in dict.fromkeys(missing)
        ),
        *(f"rows of {file}: not on this machine" for file in files),
    ]


def _check_context(model: ModelFacts, key: str, recipe: Recipe) -> None:
    longest = recipe.data.max_prompt_tokens + recipe.max_response_tokens
    if 0 < model.context < longest:
        raise ConfigError.of(
            key,
            model.name,
            f"its context of {model.context} tokens is shorter than data.max_prompt_tokens="
            f"{recipe.data.max_prompt_tokens} + {recipe.max_response_tokens} tokens of a response "
            f"(rollout.max_new_tokens={recipe.rollout.max_new_tokens}, environment.max_turns="
            f"{recipe.environment.max_turns})",
            f"lower rollout.max_new_tokens to {recipe.max_new_tokens_within(model.context)}",
        )


def _check_vocabulary(name: str, teacher: ModelFacts, student: ModelFacts) -> None:
    rows, wanted = teacher.architecture.vocab_size, student.architecture.vocab_size
    if rows != wanted:
        raise ConfigError.of(
            f"teachers.{name}.path",
            teacher.name,
            f"has {rows} embedding rows and the student {wanted}",
            "use models whose embeddings have the same number of rows",
        )


def _check_ends(name: str, config: TeacherConfig, teacher: ModelFacts, student: ModelFacts) -> None:
    if not teacher.end_tokens or not student.end_tokens:
        return
    ends = {config.aliases.get(token, token) for token in student.end_tokens}
    if ends <= set(teacher.end_tokens) and (
        config.aliases or set(student.end_tokens) == set(teacher.end_tokens)
    ):
        return
    raise ConfigError.of(
        f"teachers.{name}.aliases",
        dict(config.aliases),
        f"{student.name} ends with {', '.join(student.end_tokens)} and {teacher.name} with "
        f"{', '.join(teacher.end_tokens)}",
        "say which of the teacher's takes the place of the student's",
    )
