"""Strict check of a written-out addition: every column must be right, not only the last number.

    prompt    40+85:
    response  0+5=5,8+4=12>125

Columns go from the least significant one up. A step is `x+y=s`, or `x+y+1=s` with a carry; the two
digits of a step may come in either order. `s` is the whole sum of the column (12 above), its tens
digit is the next carry. Steps are joined by `,`; the answer follows `>`. Leading zeros and spaces
are wrong.

Strict matters: a student that recovers from a wrong step would otherwise count as right, and half
of what distillation repairs would be invisible.
"""

from __future__ import annotations

import re

_PROMPT = re.compile(r"([0-9]+)\+([0-9]+):")


def column_steps(a: int, b: int) -> list[tuple[int, int, int, int]]:
    """The columns of `a + b`, least significant first.

    Returns:
        One `(digit of a, digit of b, carry in, column sum)` per column of the longer number.
    """
    steps: list[tuple[int, int, int, int]] = []
    carry = 0
    for column in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**column % 10, b // 10**column % 10
        steps.append((x, y, carry, x + y + carry))
        carry = (x + y + carry) // 10
    return steps


def render_step(x: int, y: int, carry: int, total: int) -> str:
    """One step as text: `x+y=s`, with `+1` before the `=` when there is a carry."""
    return f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={total}"


def is_right_derivation(prompt_text: str, response_text: str) -> bool:
    """Whether every step and the answer are right.

    Args:
        prompt_text: `a+b:`.
        response_text: the response without its end token.

    Returns:
        False as well when the prompt is not an addition: nothing can be right then.
    """
    match = _PROMPT.fullmatch(prompt_text)
    if match is None:
        return False
    a, b = int(match[1]), int(match[2])
    steps_text, _, answer_text = response_text.rpartition(">")
    written = steps_text.split(",")
    expected = column_steps(a, b)
    if answer_text != str(a + b) or len(written) != len(expected):
        return False
    return all(
        text in (render_step(x, y, carry, total), render_step(y, x, carry, total))
        for text, (x, y, carry, total) in zip(written, expected, strict=True)
    )
