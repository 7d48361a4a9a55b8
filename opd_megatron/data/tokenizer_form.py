"""What a tokenizer is besides its ids: special tokens, how text is cut, the chat template. From its files alone.

A teacher only sees ids, so none of this makes its scores wrong. It makes them strange: it judges text that was cut,
marked or framed in another way than the text it was trained on. So a difference is refused too, until the recipe says
that it is known: `teachers.NAME.accept=[chat_template]`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.data.json_files import read_object
from opd_megatron.errors import TokenizerMismatch

# What a recipe may accept, and what the message calls it.
FORMS = {
    "special_tokens": "special tokens",
    "segmentation": "how text is cut into tokens",
    "chat_template": "chat template",
}
# Parts of tokenizer.json that decide how text is cut; the vocabulary itself is compared by ids.
_CUTTING = ("normalizer", "pre_tokenizer")
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_THINKING_SWITCH = "enable_thinking"


@dataclass(frozen=True)
class TokenizerForm:
    """special_ids: ids flagged as special. cutting: canonical JSON by part, only the parts that the files tell.
    chat_template: None when there is none.
    """

    special_ids: frozenset[int]
    cutting: dict[str, str]
    chat_template: str | None

    @property
    def can_switch_thinking(self) -> bool:
        """The template has a switch between thinking and plain answers."""
        return _THINKING_SWITCH in (self.chat_template or "")


def tokenizer_form(directory: Path, key: str = "student.path") -> TokenizerForm:
    """Read it.

    Raises:
        ConfigError: a file is not JSON of the expected kind.
    """
    tokenizer = read_object(directory / "tokenizer.json", key) or {}
    config = read_object(directory / "tokenizer_config.json", key) or {}
    special = {t["id"]: bool(t.get("special")) for t in tokenizer.get("added_tokens", [])}
    for index, token in config.get("added_tokens_decoder", {}).items():
        special[int(index)] = bool(token.get("special"))
    return TokenizerForm(
        frozenset(index for index, flag in special.items() if flag),
        _cutting(directory, tokenizer),
        _chat_template(directory, config),
    )


def compare_forms(
    student: TokenizerForm, teacher: TokenizerForm, key: str, where: str, accept: Collection[str]
) -> None:
    """
    Args:
        key, where: of the message: recipe key and directory of the teacher.
        accept: differences that the recipe knows of, names of `FORMS`.

    Raises:
        TokenizerMismatch: the first difference that is not accepted.
    """
    for form, difference in _differences(student, teacher):
        if form not in accept:
            section = key.rpartition(".")[0]
            raise TokenizerMismatch.between(
                key,
                where,
                FORMS[form],
                difference,
                f"use a teacher of the same model family, or, if it is known, set {section}.accept=[{form}]",
            )


def _differences(student: TokenizerForm, teacher: TokenizerForm) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    odd = sorted(student.special_ids ^ teacher.special_ids)
    if odd:
        side = "student" if odd[0] in student.special_ids else "teacher"
        found.append(("special_tokens", f"id {odd[0]} is special for the {side} only"))
    for part in sorted(student.cutting.keys() & teacher.cutting.keys()):
        ours, theirs = student.cutting[part], teacher.cutting[part]
        if ours != theirs:
            found.append(("segmentation", f"tokenizer.json, {part}: {_first_change(ours, theirs)}"))
            break
    if student.chat_template != teacher.chat_template:
        found.append(("chat_template", _template_difference(student, teacher)))
    return found


def _template_difference(student: TokenizerForm, teacher: TokenizerForm) -> str:
    ours, theirs = student.chat_template, teacher.chat_template
    if ours is None or theirs is None:
        return f"the {'student' if ours is None else 'teacher'} has none"
    said = _first_change(ours, theirs)
    if student.can_switch_thinking != teacher.can_switch_thinking:
        side = "student" if student.can_switch_thinking else "teacher"
        said += f"; only the {side}'s has a thinking mode"
    return said


def _first_change(ours: str, theirs: str) -> str:
    """Where two texts part, with a few characters of both."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    shown = slice(max(0, at - 10), at + 30)
    return f"character {at}: {ours[shown]!r} for the student, {theirs[shown]!r} for the teacher"


def _cutting(directory: Path, tokenizer: dict[str, Any]) -> dict[str, str]:
    if not tokenizer:
        merges = directory / "merges.txt"
        if not merges.is_file():
            return {}
        lines = [line for line in merges.read_text().splitlines() if not line.startswith("#")]
        return {"merges": json.dumps([line for line in lines if line])}
    model = tokenizer.get("model", {})
    parts: dict[str, Any] = {name: tokenizer.get(name) for name in _CUTTING}
    parts["model"] = {k: v for k, v in model.items() if k not in ("vocab", "merges")}
    # Written as "a b" or as ["a", "b"], depending on the version of the library.
    merges = model.get("merges", [])
    parts["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    vocab = model.get("vocab")
    parts["scores"] = [entry[1] for entry in vocab] if isinstance(vocab, list) else []
    parts["added tokens"] = sorted(
        [token["id"], *(bool(token.get(flag)) for flag in _ADDED_FLAGS)]
        for token in tokenizer.get("added_tokens", [])
    )
    return {name: json.dumps(_plain(part), sort_keys=True) for name, part in parts.items()}


def _plain(value: Any) -> Any:
    """Without entries that say nothing: versions of the library differ in whether they write them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v not in (None, False, "")}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text().strip()
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return json.dumps(template, sort_keys=True)
    return template.strip() if isinstance(template, str) else None
