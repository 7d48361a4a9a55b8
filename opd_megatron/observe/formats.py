"""Numbers as people read them, and text that a terminal can not misread."""

from __future__ import annotations

import unicodedata

_ASCII_STAND_INS = str.maketrans({"\u2192": "->", "\u00b7": "|", "\u21b5": "/"})


def human_duration(seconds: float) -> str:
    """`0.4s`, `41s`, `1m52s`, `2h14m`, `3d04h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def human_count(value: float) -> str:
    """`17.5`, `812`, `2.1k`, `41.2k`, `3.2M`."""
    if abs(value) < 99.95:
        return f"{value:.1f}"
    if abs(value) < 999.5:
        return f"{value:.0f}"
    for limit, divisor, letter in ((999.95e3, 1e3, "k"), (999.95e6, 1e6, "M")):
        if abs(value) < limit:
            return f"{value / divisor:.1f}{letter}"
    return f"{value / 1e9:.1f}G"


def human_value(value: float, unit: str = "") -> str:
    """A metric in three digits: `0.183`, `36.1%`, `3.4e-06`; ratios need more: `1.00002`."""
    if unit == "fraction":
        return f"{100 * value:.1f}%"
    if unit == "ratio":
        return f"{value:.5f}"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return human_count(value)
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) < 0.01:
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:#.3g}".rstrip(".")


def visible(text: str) -> str:
    """Control, format and surrogate characters as escapes: no token may steer a terminal."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" else char
        for char in text
    )


def encodable(text: str, encoding: str | None) -> str:
    """`text` with stand-ins for what `encoding` can not hold: a log line must never end a run.

    `encoding` is that of a text stream; None (a stream in memory) holds everything.
    """
    if encoding is None:
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.translate(_ASCII_STAND_INS)
        return plain.encode(encoding, "backslashreplace").decode(encoding)
    return text
