"""What a tokenizer means, from its files alone: token of each id, vocabulary size, end tokens.

Distillation compares log-probs of the same ids under two models, so student and teacher must agree
on what every id means. How text is cut into tokens (merges) is the student's own business: a
teacher only ever sees ids.

Reads `tokenizer.json` (or `vocab.json`/`added_tokens.json`, the older layout),
`tokenizer_config.json`, `config.json` and `generation_config.json`. Imports neither torch nor
transformers, so `opd validate` can use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.errors import ConfigError


@dataclass(frozen=True)
class TokenizerFingerprint:
    """What ids mean to one model.

    Attributes:
        tokens: token of each id.
        vocab_size: rows of the model's embedding (`config.json`); may exceed the number of tokens.
        eos_ids: every id a server ends a response with.
        digest: SHA-256 of all of the above.
    """

    tokens: dict[int, str]
    vocab_size: int
    eos_ids: tuple[int, ...]
    digest: str


def tokenizer_fingerprint(directory: Path, key: str = "student.path") -> TokenizerFingerprint:
    """Read the tokenizer of a Hugging Face model directory.

    Args:
        key: the recipe key that named the directory, for messages.

    Raises:
        ConfigError: a file is missing or is not what its name says.
    """
    config = _read_object(directory / "config.json", key)
    if config is None:
        raise ConfigError.of(
            key, str(directory), "no config.json there", "name a Hugging Face model directory"
        )
    tokens = _read_tokens(directory, key)
    # Multimodal configurations keep the language model's settings one level down.
    text_config = config.get("text_config") or config
    vocab_size = text_config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size <= max(tokens):
        raise ConfigError.of(
            key,
            str(directory),
            f"config.json has vocab_size={vocab_size!r}, its tokenizer has ids up to {max(tokens)}",
            "use the tokenizer that belongs to this model",
        )
    eos_ids = _read_eos_ids(directory, text_config, tokens, key)
    record = json.dumps([sorted(tokens.items()), vocab_size, eos_ids])
    return TokenizerFingerprint(
        tokens, vocab_size, eos_ids, hashlib.sha256(record.encode()).hexdigest()
    )


def compare_tokenizers(
    student_directory: Path,
    teacher_directory: Path,
    teacher_name: str = "main",
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Check that student and teacher give every id the same meaning, and end with the same tokens.

    Args:
        aliases: student token -> teacher token; the student's end tokens are compared after it.

    Raises:
        ConfigError: they differ; the message names the first difference and both sides of it.
    """
    teacher_key = f"teachers.{teacher_name}.path"
    student = tokenizer_fingerprint(student_directory, "student.path")
    teacher = tokenizer_fingerprint(teacher_directory, teacher_key)
    if student.digest == teacher.digest and not aliases:
        return
    if student.tokens != teacher.tokens:
        difference = _first_difference(student.tokens, teacher.tokens)
        fix = "use a teacher of the same model family"
    elif student.vocab_size != teacher.vocab_size:
        difference = (
            f"vocabulary size is {student.vocab_size} for the student and {teacher.vocab_size} for "
            "the teacher"
        )
        fix = "use models whose embeddings have the same number of rows"
    else:
        ends = {(aliases or {}).get(student.tokens[i], student.tokens[i]) for i in student.eos_ids}
        if aliases and ends <= {teacher.tokens[i] for i in teacher.eos_ids}:
            return
        difference = (
            f"end tokens are {_named(student)} for the student and {_named(teacher)} for the "
            "teacher"
        )
        fix = (
            f"say which of the teacher's takes the place of the student's: teachers.{teacher_name}."
            "aliases={student token: teacher token}, or use two models of the same kind"
        )
    raise ConfigError.of(
        teacher_key,
        str(teacher_directory),
        f"its tokenizer differs from the student's ({student_directory}): {difference}",
        fix,
    )


def _first_difference(student: dict[int, str], teacher: dict[int, str]) -> str:
    index = min(i for i in student.keys() | teacher.keys() if student.get(i) != teacher.get(i))
    return (
        f"id {index} is {student.get(index)!r} for the student and {teacher.get(index)!r} for the "
        f"teacher (None: no such id; {len(student)} and {len(teacher)} tokens)"
    )


def _named(fingerprint: TokenizerFingerprint) -> str:
    return ", ".join(f"{index} {fingerprint.tokens.get(index)!r}" for index in fingerprint.eos_ids)


def _read_object(path: Path, key: str) -> dict[str, Any] | None:
    """The JSON object of a file, None when there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError.of(
            key, str(path), f"not JSON ({error})", "copy the model again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError.of(key, str(path), "not a JSON object", "copy the model again")
    return value


def _read_tokens(directory: Path, key: str) -> dict[int, str]:
    """Id -> token, from `tokenizer.json` or the older `vocab.json`; added tokens win."""
    tokenizer = _read_object(directory / "tokenizer.json", key)
    if tokenizer is not None:
        vocab = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocab, list):  # unigram models: [[token, score], ...]
            vocab = {entry[0]: index for index, entry in enumerate(vocab)}
        added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    else:
        vocab = _read_object(directory / "vocab.json", key) or {}
        extra = _read_object(directory / "added_tokens.json", key) or {}
        added = {index: token for token, index in extra.items()}
    tokens = {index: token for token, index in vocab.items()} | added
    config = _read_object(directory / "tokenizer_config.json", key) or {}
    for index, token in config.get("added_tokens_decoder", {}).items():
        tokens[int(index)] = token["content"]
    if not tokens:
        raise ConfigError.of(
            key, str(directory), "no tokenizer there", "add tokenizer.json to the model directory"
        )
    return tokens


def _read_eos_ids(
    directory: Path, config: dict[str, Any], tokens: dict[int, str], key: str
) -> tuple[int, ...]:
    """Union of what three files name: a server stops at any of them."""
    generation = _read_object(directory / "generation_config.json", key) or {}
    found: set[int] = set()
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    tokenizer_config = _read_object(directory / "tokenizer_config.json", key) or {}
    eos_token = tokenizer_config.get("eos_token")
    if isinstance(eos_token, dict):
        eos_token = eos_token["content"]
    found.update(index for index, token in tokens.items() if token == eos_token)
    if not found:
        raise ConfigError.of(
            key,
            str(directory),
            "no end token in config.json, generation_config.json or tokenizer_config.json",
            "set eos_token_id in generation_config.json",
        )
    return tuple(sorted(found))
