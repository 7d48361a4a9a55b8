"""Read prompt rows from JSONL or parquet, and refuse the bad ones with file, line and reason.

    {"prompt": "40+85:", "answer": "125"}
    {"prompt": [{"role": "user", "content": "40+85:"}], "id": "p-7", "teacher": "math"}
    {"prompt": "40+85:", "domain": "sums"}                         teaching.domains, data.alternate_domains
    {"prompt": "40+85:", "response": "0+5=5,8+4=12>125"}           supervised training
    {"prompt": [{"role": "user", ...}, {"role": "assistant", ...}]}   the same

A refused row is counted by reason and its place is kept; more of them than the budget allows ends
the run before it starts. Nothing else is lost: every other row becomes one prompt, in file order.
Blank lines are not rows. Needs no tokenizer and no torch, so a login node can check a file; what
only the tokenizer can tell (over-long, a character it does not know) is checked in `prompts.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_megatron.config.schema import DataConfig
from opd_megatron.errors import DataError, did_you_mean

Message = dict[str, str]  # {"role": ..., "content": ...}

EXAMPLES_PER_REASON = 2  # of refused rows, kept for the message: enough to see a pattern


class BadRow(Exception):
    """One row that can not be used. `reason` is the word it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """A checked row that is not encoded yet. `source` is `file:line`; `response` is read on request."""

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None
    teacher: str | None
    source: str
    response: str | None = None
    domain: str | None = None


@dataclass
class Rejections:
    """Refused rows of one file: how many by reason, and the first of each reason in words."""

    by_reason: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, source: str, error: BadRow) -> None:
        self.by_reason[error.reason] += 1
        if self.by_reason[error.reason] <= EXAMPLES_PER_REASON:
            self.examples.append(f"{source}: {error.reason}: {error}")

    def copy(self) -> Rejections:
        return Rejections(self.by_reason.copy(), self.examples.copy())

    def check_budget(self, key: str, path: Path, num_rows: int, max_bad_rows_frac: float) -> None:
        """
        Raises:
            DataError: more rows were refused than allowed, or none is left.
        """
        refused = self.by_reason.total()
        if refused < num_rows and refused <= max_bad_rows_frac * num_rows:
            return
        if num_rows == 0:
            raise DataError.of(key, str(path), "the file has no rows", "name a file with prompts")
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.by_reason.most_common())
        first = "".join(f"\n  {example}" for example in self.examples)
        raise DataError(
            f"{key}={str(path)!r}: {refused} of {num_rows} rows cannot be used ({reasons}), "
            f"more than data.max_bad_rows_frac={max_bad_rows_frac} allows; fix them or raise it "
            f"(at least one good row is needed). The first ones:{first}"
        )


@dataclass(frozen=True)
class RowScan:
    """What reading a file gave: usable rows in file order, and what was refused."""

    path: Path
    key: str
    rows: tuple[Row, ...]
    rejections: Rejections
    num_rows: int


def scan_rows(
    path: Path,
    config: DataConfig,
    teachers: Collection[str],
    key: str = "data.train",
    *,
    with_response: bool = False,
) -> RowScan:
    """Read and check every row of a `.jsonl` or `.parquet` file.

    Args:
        path: the file, already resolved against the recipe's directory.
        teachers: names a row's `teacher` may have.
        key: the recipe key that named the file, for messages.
        with_response: every row must hold the response, and a row's `teacher` means nothing.

    Raises:
        DataError: no such file, not readable as its suffix says, or more bad rows than
            `data.max_bad_rows_frac`.
    """
    rows: list[Row] = []
    rejections = Rejections()
    seen_ids: dict[str, str] = {}
    num_rows = 0
    for source, raw in _read(path, config, key):
        num_rows += 1
        try:
            row = _check_row(raw, source, config, teachers, with_response)
            if row.id in seen_ids:
                raise BadRow("duplicate_id", f"id {row.id!r} is also at {seen_ids[row.id]}")
        except BadRow as error:
            rejections.add(source, error)
            continue
        seen_ids[row.id] = source
        rows.append(row)
    rejections.check_budget(key, path, num_rows, config.max_bad_rows_frac)
    return RowScan(path, key, tuple(rows), rejections, num_rows)


def _read(path: Path, config: DataConfig, key: str) -> Iterator[tuple[str, Any]]:
    """`(source, row)` for each row; a row that could not be read at all is a `BadRow`."""
    if not path.is_file():
        raise DataError.of(
            key,
            str(path),
            "no such file",
            "a path in a recipe is relative to it or to a folder of OPD_DATA, one in an override to this directory",
        )
    if path.suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, config, key)
    raise DataError.of(
        key, str(path), "only .jsonl and .parquet files are read", "convert the file to one of them"
    )


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", _parse_line(line)


def _parse_line(line: bytes) -> Any:
    """The JSON value of a line, or a `BadRow`. Bad UTF-8 and too deep nesting are broken too."""
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        return BadRow("broken_json", str(error)[:200])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key is given twice")
    return row


def _read_parquet(path: Path, config: DataConfig, key: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError.of(
            key, str(path), f"not a parquet file: {error}", "write it again"
        ) from error
    names = file.schema_arrow.names
    if config.prompt_key not in names:
        raise DataError.of(
            "data.prompt_key",
            config.prompt_key,
            f"{path.name} has no such column{did_you_mean(config.prompt_key, names)}",
            f"use one of: {', '.join(names)}",
        )
    wanted = [name for name in _columns(config) if name in names]
    number = 0
    for batch in file.iter_batches(columns=wanted):
        columns = [batch.column(name) for name in wanted]
        for index in range(batch.num_rows):
            number += 1
            yield f"{path.name}:{number}", _parquet_row(wanted, columns, index)


def _parquet_row(names: list[str], columns: list[Any], index: int) -> Any:
    try:
        return {name: column[index].as_py() for name, column in zip(names, columns, strict=True)}
    except UnicodeDecodeError as error:
        return BadRow("bad_characters", str(error))


def _columns(config: DataConfig) -> tuple[str, ...]:
    keys = (config.prompt_key, config.answer_key, config.response_key, "id", "teacher", "domain")
    return tuple(dict.fromkeys(keys))


def _check_row(
    raw: Any, source: str, config: DataConfig, teachers: Collection[str], with_response: bool
) -> Row:
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, dict):
        raise BadRow("wrong_type", f"a row must be an object, not {type(raw).__name__}")
    if raw.get(config.prompt_key) is None:
        raise BadRow("missing_key", f"no {config.prompt_key!r}")
    asked, response = raw[config.prompt_key], None
    if with_response:
        asked, response = _split_response(raw, config)
    prompt = _check_prompt(asked, config.prompt_key)
    teacher = None if with_response else _optional_text(raw, "teacher")
    if teacher is not None and teacher not in teachers:
        known = ", ".join(sorted(teachers))
        raise BadRow(
            "unknown_teacher", f"{teacher!r}{did_you_mean(teacher, teachers)}; teachers: {known}"
        )
    answer = _optional_text(raw, config.answer_key)
    row_id = _optional_text(raw, "id") or _derived_id(prompt, source)
    domain = _optional_text(raw, "domain")
    return Row(row_id, prompt, answer, teacher, source, response, domain)


def _split_response(raw: dict[str, Any], config: DataConfig) -> tuple[Any, str]:
    """The prompt, not checked yet, and the response of a row.

    The response is text or a list of one assistant message under `data.response_key`, or the last message of
    the prompt's list.
    """
    asked, key = raw[config.prompt_key], config.response_key
    value = None if key == config.prompt_key else raw.get(key)
    ends = isinstance(asked, list) and bool(asked) and _is_assistant(asked[-1])
    if value is None and not ends:
        raise BadRow("missing_key", f"no {key!r}, and {config.prompt_key!r} has no last answer")
    if value is None:
        return asked[:-1], _check_message(asked[-1], config.prompt_key)["content"]
    if ends:
        raise BadRow("wrong_type", f"two responses: {key!r} and the end of {config.prompt_key!r}")
    if isinstance(value, list) and len(value) == 1 and _is_assistant(value[0]):
        return asked, _check_message(value[0], key)["content"]
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{key!r} must be text or a list of one assistant message")
    return asked, _check_text(value, key)


def _is_assistant(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _derived_id(prompt: str | tuple[Message, ...], source: str) -> str:
    """From content and position: stable when the file is read again, distinct for equal prompts."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:12]
    return f"{source}-{digest}"


def _check_prompt(value: Any, key: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return _check_text(value, key)
    if not isinstance(value, list):
        raise BadRow(
            "wrong_type", f"{key!r} must be text or a list of messages, not {type(value).__name__}"
        )
    if not value:
        raise BadRow("empty", f"{key!r} has no messages")
    messages = tuple(_check_message(message, key) for message in value)
    if messages[-1]["role"] == "assistant":
        raise BadRow("wrong_type", f"{key!r} ends with an assistant message; nothing is asked")
    return messages


def _check_message(message: Any, key: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow("wrong_type", f"a message of {key!r} is {type(message).__name__}, not object")
    # Parquet gives every message the same fields; those a message does not use are null.
    used = {name: value for name, value in message.items() if value is not None}
    if set(used) != {"role", "content"}:
        raise BadRow(
            "wrong_type", f"a message of {key!r} has {sorted(used)}, not 'role' and 'content' only"
        )
    if not isinstance(used["role"], str) or not isinstance(used["content"], str):
        raise BadRow("wrong_type", f"'role' and 'content' of a message of {key!r} must be text")
    return {"role": _check_text(used["role"], "role"), "content": _check_text(used["content"], key)}


def _optional_text(row: dict[str, Any], key: str) -> str | None:
    """Text, or an integer written as text (answers and ids often are); None when absent or null."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{key!r} must be text, not {type(value).__name__}")
    return _check_text(value, key)


def _check_text(value: str, key: str) -> str:
    if not value.strip():
        raise BadRow("empty", f"{key!r} is empty")
    if "\0" in value:
        raise BadRow("bad_characters", f"{key!r} contains a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow("bad_characters", f"{key!r} contains a lone surrogate, which is not text")
    return value
