"""What a tokenizer means, from its files alone: bytes of each id, vocabulary size, end tokens.

Distillation compares log-probs of the same ids under two models, so student and teacher must agree
on what every id means: on the bytes it stands for (`token_bytes.py`). What else differs between two
tokenizers is in `tokenizer_form.py`.

Reads `tokenizer.json` (or `vocab.json`/`added_tokens.json`, the older layout),
`tokenizer_config.json`, `config.json` and `generation_config.json`. Imports neither torch nor
transformers, so `opd validate` can use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.data.json_files import read_object
from opd_megatron.data.token_bytes import bytes_of_tokens
from opd_megatron.data.tokenizer_form import compare_forms, tokenizer_form
from opd_megatron.errors import ConfigError, TokenizerMismatch


@dataclass(frozen=True)
class TokenizerFingerprint:
    """What ids mean to one model.

    Attributes:
        tokens: token of each id, as the files spell it.
        contents: the bytes that each id stands for.
        vocab_size: rows of the model's embedding (`config.json`); may exceed the number of tokens.
        eos_ids: every id a server ends a response with.
        digest: SHA-256 of contents, vocab_size and eos_ids.
    """

    tokens: dict[int, str]
    contents: dict[int, bytes]
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
    config = read_object(directory / "config.json", key)
    if config is None:
        raise ConfigError.of(
            key, str(directory), "no config.json there", "name a Hugging Face model directory"
        )
    tokens, contents = _read_tokens(directory, key)
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
    listed = [[index, content.hex()] for index, content in sorted(contents.items())]
    record = json.dumps([listed, vocab_size, eos_ids])
    digest = hashlib.sha256(record.encode()).hexdigest()
    return TokenizerFingerprint(tokens, contents, vocab_size, eos_ids, digest)


def compare_tokenizers(
    student_directory: Path,
    teacher_directory: Path,
    teacher_name: str = "main",
    aliases: Mapping[str, str] | None = None,
    accept: Collection[str] = (),
) -> None:
    """Check that student and teacher give every id the same meaning, end with the same tokens, and have one form.

    Args:
        aliases: student token -> teacher token; the student's end tokens are compared after it.
        accept: differences of form that the recipe knows of (`tokenizer_form.py`).

    Raises:
        TokenizerMismatch: they differ; the message names the first difference and both sides of it.
        ConfigError: a file is missing or is not what its name says.
    """
    teacher_key = f"teachers.{teacher_name}.path"
    _compare_ids(student_directory, teacher_directory, teacher_name, aliases)
    compare_forms(
        tokenizer_form(student_directory, "student.path"),
        tokenizer_form(teacher_directory, teacher_key),
        teacher_key,
        str(teacher_directory),
        accept,
    )


def _compare_ids(
    student_directory: Path,
    teacher_directory: Path,
    teacher_name: str,
    aliases: Mapping[str, str] | None,
) -> None:
    teacher_key = f"teachers.{teacher_name}.path"
    student = tokenizer_fingerprint(student_directory, "student.path")
    teacher = tokenizer_fingerprint(teacher_directory, teacher_key)
    if student.digest == teacher.digest and not aliases:
        return
    if student.contents != teacher.contents:
        what, difference = "tokens", _first_difference(student, teacher)
        fix = "use a teacher of the same model family"
    elif student.vocab_size != teacher.vocab_size:
        what = "vocabulary size"
        difference = (
            f"vocabulary size is {student.vocab_size} for the student and {teacher.vocab_size} for "
            "the teacher"
        )
        fix = "use models whose embeddings have the same number of rows"
    else:
        ends = {(aliases or {}).get(student.tokens[i], student.tokens[i]) for i in student.eos_ids}
        if aliases and ends <= {teacher.tokens[i] for i in teacher.eos_ids}:
            return
        what = "end tokens"
        difference = (
            f"end tokens are {_named(student)} for the student and {_named(teacher)} for the "
            "teacher"
        )
        fix = _end_token_fix(student, teacher, teacher_name)
    raise TokenizerMismatch.between(teacher_key, str(teacher_directory), what, difference, fix)


def _end_token_fix(
    student: TokenizerFingerprint, teacher: TokenizerFingerprint, teacher_name: str
) -> str:
    """What happens without an alias, and the alias that is most likely meant."""
    ours = [student.tokens[i] for i in student.eos_ids if i not in teacher.eos_ids]
    theirs = [teacher.tokens[i] for i in teacher.eos_ids if i not in student.eos_ids]
    one = ours[0] if ours else student.tokens[student.eos_ids[0]]
    other = theirs[0] if theirs else teacher.tokens[teacher.eos_ids[0]]
    return (
        "a teacher gives an end token that is not its own almost no probability, so the student would unlearn to stop; "
        "say which of the teacher's takes the place of the student's, e.g. "
        f"'teachers.{teacher_name}.aliases.{one}={other}', or use two models of the same kind"
    )


def _first_difference(student: TokenizerFingerprint, teacher: TokenizerFingerprint) -> str:
    ours, theirs = student.contents, teacher.contents
    index = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    one, other = student.tokens.get(index), teacher.tokens.get(index)
    if one == other:
        said = f"id {index} is spelled {one!r} by both and stands for {ours[index]!r} and {theirs[index]!r}"
    else:
        said = f"id {index} is {one!r} for the student and {other!r} for the teacher"
    return f"{said} (None: no such id; {len(ours)} and {len(theirs)} tokens)"


def _named(fingerprint: TokenizerFingerprint) -> str:
    return ", ".join(f"{index} {fingerprint.tokens.get(index)!r}" for index in fingerprint.eos_ids)


def _read_tokens(directory: Path, key: str) -> tuple[dict[int, str], dict[int, bytes]]:
    """Id -> token and id -> bytes, from `tokenizer.json` or the older `vocab.json`; added tokens win."""
    tokenizer = read_object(directory / "tokenizer.json", key)
    if tokenizer is not None:
        vocab = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocab, list):  # unigram models: [[token, score], ...]
            vocab = {entry[0]: index for index, entry in enumerate(vocab)}
        added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
        decoder = tokenizer.get("decoder")
    else:
        vocab = read_object(directory / "vocab.json", key) or {}
        extra = read_object(directory / "added_tokens.json", key) or {}
        added = {index: token for token, index in extra.items()}
        # The older layout comes with merges and is byte-level.
        decoder = {"type": "ByteLevel"} if (directory / "merges.txt").is_file() else None
    config = read_object(directory / "tokenizer_config.json", key) or {}
    for index, token in config.get("added_tokens_decoder", {}).items():
        added[int(index)] = token["content"]
    tokens = {index: token for token, index in vocab.items()} | added
    if not tokens:
        raise ConfigError.of(
            key, str(directory), "no tokenizer there", "add tokenizer.json to the model directory"
        )
    return tokens, bytes_of_tokens(tokens, added, decoder)


def _read_eos_ids(
    directory: Path, config: dict[str, Any], tokens: dict[int, str], key: str
) -> tuple[int, ...]:
    """Union of what three files name: a server stops at any of them."""
    generation = read_object(directory / "generation_config.json", key) or {}
    found: set[int] = set()
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    tokenizer_config = read_object(directory / "tokenizer_config.json", key) or {}
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
