"""docs/troubleshooting.md quotes messages that the program really prints, and keys and metrics that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
_ROW = re.compile(r"^\| (`.*?) \| ")
_QUOTE = re.compile(r"`([^`]+)`")


def texts_of_the_source() -> str:
    """Every text of the package, one a line; of an f-string what is not computed; and the job script."""
    found: list[str] = []
    for path in sorted((ROOT / "opd_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join([*found, (ROOT / "slurm/job.sh.j2").read_text()])


def quoted_messages() -> Iterator[str]:
    """The first cell of every row that begins with a quotation, but for exit codes."""
    for line in PAGE.read_text().splitlines():
        row = _ROW.match(line)
        if row:
            yield from _QUOTE.findall(row[1])


def test_every_quoted_message_is_in_the_source() -> None:
    source = texts_of_the_source()
    messages = list(quoted_messages())
    assert len(messages) > 60
    pieces = [piece for message in messages for piece in message.split("...") if piece.strip()]
    assert [piece for piece in pieces if piece.strip() not in source] == []
