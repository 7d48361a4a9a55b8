"""What can be checked of a recipe's inputs in a second, before any process is started: files, tokenizers, rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from opd_megatron.config.schema import Recipe
from opd_megatron.data.rows import RowScan, scan_rows
from opd_megatron.data.tokenizer_files import compare_tokenizers, tokenizer_fingerprint
from opd_megatron.errors import ConfigError


@dataclass(frozen=True)
class InputFacts:
    """What the checks found, for `opd validate` and the head of a run."""

    vocab_size: int
    tokenizer_digest: str
    eos_ids: tuple[int, ...]
    train: RowScan
    heldout: RowScan | None


def read_model_config(directory: Path, key: str) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        ConfigError: no such directory, no weights in it, or an unreadable config.json.
    """
    if not directory.is_dir():
        raise ConfigError.of(
            key,
            str(directory),
            "no such directory",
            "download the model and give the path of its folder",
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigError.of(
            key, str(directory), "holds no .safetensors file", "convert the weights"
        )
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError.of(
            key, str(directory), f"config.json: {error}", "copy the model again"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError.of(
            key, str(directory), "config.json is not an object", "copy the model again"
        )
    return cast(dict[str, Any], config)


def _check_context(config: dict[str, Any], key: str, recipe: Recipe) -> None:
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and longest > context:
        raise ConfigError.of(
            key,
            config.get("_name_or_path", key),
            f"its context of {context} tokens is shorter than data.max_prompt_tokens="
            f"{recipe.data.max_prompt_tokens} + rollout.max_new_tokens={recipe.rollout.max_new_tokens}",
            f"lower rollout.max_new_tokens to {max(1, context - recipe.data.max_prompt_tokens)}",
        )


def check_inputs(recipe: Recipe) -> InputFacts:
    """Check model directories, that student and teachers share one tokenizer, and every data row.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    student = Path(recipe.student.path)
    _check_context(read_model_config(student, "student.path"), "student.path", recipe)
    for name, teacher in recipe.teachers.items():
        key = f"teachers.{name}.path"
        _check_context(read_model_config(Path(teacher.path), key), key, recipe)
        compare_tokenizers(student, Path(teacher.path), name)
    train = scan_rows(Path(recipe.data.train), recipe.data, recipe.teachers)
    heldout = None
    if recipe.data.heldout:
        heldout = scan_rows(Path(recipe.data.heldout), recipe.data, recipe.teachers, "data.heldout")
    fingerprint = tokenizer_fingerprint(student)
    return InputFacts(
        vocab_size=fingerprint.vocab_size,
        tokenizer_digest=fingerprint.digest,
        eos_ids=fingerprint.eos_ids,
        train=train,
        heldout=heldout,
    )
