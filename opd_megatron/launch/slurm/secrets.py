"""Secrets of a site: read from files on the node when a role starts, and handed to its processes as environment.

Only the paths are written down. A value is in no script, argument list, log or file of the run.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from opd_megatron.errors import ConfigError


def read(paths: Mapping[str, str]) -> dict[str, str]:
    """The values, by variable name; white space at the end of a file does not count.

    Raises:
        ConfigError: a file that is missing, empty, or open to other users.
    """
    found: dict[str, str] = {}
    for name, text in paths.items():
        key, path = f"cluster.secrets.{name}", Path(text).expanduser()
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            value = path.read_text().rstrip()
        except OSError as error:
            raise ConfigError.of(
                key, text, f"cannot be read: {error.strerror}", "make it"
            ) from error
        if mode & 0o077:
            raise ConfigError.of(key, text, f"mode {mode:o} lets others read it", "chmod 600")
        if not value or "\n" in value or "\0" in value:
            raise ConfigError.of(key, text, "must hold one line", "write the value alone into it")
        found[name] = value
    return found
