"""Small checks on the fields of a decoded answer. Each raises `ContractError` naming field, value and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from opd_megatron.errors import ContractError

_MAX_VERSION_DIGITS = 18


def broken(field: str, seen: object, rule: str) -> NoReturn:
    """Raise the ContractError of one field."""
    shown = repr(seen)
    raise ContractError(f"{field}={shown[:200]}{'...' if len(shown) > 200 else ''}: {rule}")


def check_equal(field: str, seen: Any, wanted: Any) -> None:
    """The field must be this value, of this very type (True is not 1)."""
    if type(seen) is not type(wanted) or seen != wanted:
        broken(field, seen, f"must be {wanted!r}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def check_token_id(field: str, value: Any, vocab_size: int) -> None:
    if not is_int(value) or not 0 <= value < vocab_size:
        broken(field, value, f"must be a token id in [0, {vocab_size})")


def read_rows(field: str, value: Any, expected: int) -> list[Sequence[Any]]:
    """Rows `[logprob, id, text]`, exactly `expected` of them."""
    if not isinstance(value, list) or len(value) != expected:
        broken(field, value, f"must be a list of {expected} rows")
    for position, row in enumerate(value):
        if not isinstance(row, list) or len(row) < 2:
            broken(f"{field}[{position}]", row, "must be [logprob, id, text]")
    return value


def parse_version(field: str, value: Any) -> int:
    """A weight version label: the decimal text of an integer that the run gave to the server."""
    # Python refuses to read a number of more than some thousand digits.
    is_decimal = isinstance(value, str) and value.isascii() and value.isdigit()
    if not is_decimal or len(value) > _MAX_VERSION_DIGITS:
        broken(field, value, "must be a decimal weight version")
    return int(value)
