"""JSON objects of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd_megatron.errors import ConfigError


def read_object(path: Path, key: str) -> dict[str, Any] | None:
    """The JSON object of a file, None when there is no such file.

    Args:
        key: the recipe key that named the directory, for messages.

    Raises:
        ConfigError: the file holds something else.
    """
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
