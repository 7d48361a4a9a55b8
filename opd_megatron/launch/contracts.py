"""What student, teachers and objective must agree on besides the tokenizer. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from opd_megatron.config.schema import MEANS, Recipe, TeacherConfig
from opd_megatron.data.tokenizer_form import tokenizer_form
from opd_megatron.errors import ConfigError
from opd_megatron.losses.settings import LISTED_SUPPORTS, LossSettings


def check_vocabulary_uses(recipe: Recipe, vocab_size: int) -> None:
    """K within the vocabulary, and teacher temperatures that can be computed.

    Args:
        vocab_size: of student and teachers.

    Raises:
        ConfigError: see above.
    """
    settings = LossSettings.of(recipe)
    uses_k = settings.teacher_topk > 0 and not settings.has_full_support
    if uses_k and recipe.objective.topk > vocab_size:
        raise ConfigError.of(
            "objective.topk",
            recipe.objective.topk,
            f"the vocabulary has {vocab_size} tokens",
            f"set objective.topk={vocab_size}, which is all of them, or less",
        )
    _check_mixed_temperatures(recipe)
    for name, teacher in recipe.served_teachers.items():
        if teacher.temperature == 1.0 or settings.teacher_topk == vocab_size:
            continue
        raise ConfigError.of(
            f"teachers.{name}.temperature",
            teacher.temperature,
            "a server scores at temperature 1, and at another one the normaliser is a sum over the whole vocabulary; "
            f"this objective asks the server for {settings.teacher_topk or 'none'} of its {vocab_size} tokens",
            f"set teachers.{name}.engine=in_process, which is exact at any temperature, or temperature=1.0",
        )


def check_thinking(recipe: Recipe) -> None:
    """
    Raises:
        ConfigError: the recipe asks for a mode that the student's chat template does not know.
    """
    if recipe.data.thinking == "template":
        return
    if not tokenizer_form(Path(recipe.student.path)).can_switch_thinking:
        raise ConfigError.of(
            "data.thinking",
            recipe.data.thinking,
            "the student's chat template has no such switch (enable_thinking)",
            "set data.thinking=template",
        )


def _check_mixed_temperatures(recipe: Recipe) -> None:
    """A mean is of distributions at temperature 1, and so is what a server says of tokens that it did not choose."""
    listed = bool(recipe.served_teachers) and recipe.objective.support in LISTED_SUPPORTS
    listed = listed and LossSettings.of(recipe).has_support
    is_mean = recipe.teaching.kind in (*MEANS, "soft_switch")
    for name, teacher in recipe.teachers.items():
        if teacher.temperature == 1.0 or not (is_mean or listed):
            continue
        why = f"teaching.kind={recipe.teaching.kind}"
        if not is_mean:
            why = f"objective.support={recipe.objective.support}"
        raise ConfigError.of(
            f"teachers.{name}.temperature",
            teacher.temperature,
            f"{why} is computed from distributions at temperature 1",
            f"set teachers.{name}.temperature=1.0",
        )


# Blocks all over a weights file: a fine-tune may leave the embeddings in front and the last layers as they were.
_BLOCK_BYTES = 1 << 16
_BLOCKS = 33


def check_not_student(student: Path, name: str, teacher: TeacherConfig) -> None:
    """
    Raises:
        ConfigError: the teacher's weights are the student's, and the recipe does not say that they may be.
    """
    if teacher.may_equal_student or _signature(student) != _signature(Path(teacher.path)):
        return
    raise ConfigError.of(
        f"teachers.{name}.path",
        teacher.path,
        f"holds the student's own weights ({student}): every divergence is 0 and nothing is learned",
        f"name another model, or set teachers.{name}.may_equal_student=true if that is meant",
    )


def _signature(directory: Path) -> list[tuple[int, str]]:
    """Size of every weights file, and a hash of blocks from its first to its last byte, evenly spread."""
    found: list[tuple[int, str]] = []
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for number in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
        found.append((size, digest.hexdigest()))
    return found
