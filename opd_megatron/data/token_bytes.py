"""From the text that a tokenizer file spells a token with to the bytes that it stands for. Standard library only.

Two models mean the same by an id when it stands for the same bytes. Vocabularies spell bytes in different ways, and the
decoder of `tokenizer.json` says which:

    ByteLevel       every character is one byte, by GPT-2's table: space is U+0120
    ByteFallback    <0x41> is one byte; with Replace the character U+2581 is a space
    anything else   the text itself, in UTF-8

Added tokens are always their text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, cast

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NUM_BYTES = 256


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes are themselves, the others follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(_NUM_BYTES) if byte not in set(printable)]
    return table | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def decoder_types(decoder: object) -> list[dict[str, Any]]:
    """The decoder and all decoders inside it, flat."""
    if not isinstance(decoder, dict):
        return []
    section = cast(dict[str, Any], decoder)
    return [section, *(d for inner in section.get("decoders", []) for d in decoder_types(inner))]


def bytes_of_tokens(
    tokens: Mapping[int, str], added_ids: Collection[int], decoder: object
) -> dict[int, bytes]:
    """Bytes of every id.

    Args:
        tokens: text of each id, as the files spell it.
        added_ids: of added tokens.
        decoder: that section of `tokenizer.json`.
    """
    return dict(_each(tokens, set(added_ids), decoder_types(decoder)))


def _each(
    tokens: Mapping[int, str], added: set[int], decoders: list[dict[str, Any]]
) -> Iterator[tuple[int, bytes]]:
    names = {decoder.get("type") for decoder in decoders}
    table = byte_of_character() if "ByteLevel" in names else None
    replaced = [
        (decoder["pattern"]["String"], decoder["content"])
        for decoder in decoders
        if decoder.get("type") == "Replace" and "String" in decoder.get("pattern", {})
    ]
    for index, text in tokens.items():
        if index in added:
            yield index, text.encode()
        elif table is not None and all(character in table for character in text):
            yield index, bytes(table[character] for character in text)
        elif "ByteFallback" in names and (match := _BYTE.fullmatch(text)):
            yield index, bytes([int(match[1], 16)])
        else:
            for old, new in replaced:
                text = text.replace(old, new)
            yield index, text.encode(errors="surrogatepass")
