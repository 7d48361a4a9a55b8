"""The two keys of a run's servers, and the file (mode 0600) that carries them from the supervisor.

`api` opens generation and scoring, `admin` opens weight updates, cache flushes and aborts. Keys
travel in this file only: never in an argument list, an environment variable, a log line or a YAML
file, all of which other users of a machine or readers of a run directory may see.
"""

from __future__ import annotations

import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.atomic import read_json, write_json
from opd_megatron.errors import ConfigError

# 32 random bytes; SGLang compares keys in constant time, so their length is all that protects them.
_KEY_BYTES = 32
_PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """Both keys. The representation hides them, so that no traceback or log line leaks them."""

    api: str
    admin: str

    def __repr__(self) -> str:
        return "ServerKeys(api=<hidden>, admin=<hidden>)"


def new_keys() -> ServerKeys:
    """Draw two fresh keys from the operating system's random source."""
    return ServerKeys(secrets.token_urlsafe(_KEY_BYTES), secrets.token_urlsafe(_KEY_BYTES))


def write_keys(path: Path, keys: ServerKeys) -> None:
    """Write the keys so that only this user can read them."""
    write_json(path, {"api": keys.api, "admin": keys.admin}, durable=False, mode=_PRIVATE)


def read_keys(path: Path) -> ServerKeys:
    """Read keys that `write_keys` wrote.

    Raises:
        ConfigError: the file is missing, not JSON of two keys, or readable by other users.
    """
    fix = "let the supervisor write it (write_keys)"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError.of(
            "keys_file", str(path), f"must exist ({error.strerror})", fix
        ) from error
    if mode & 0o077:
        raise ConfigError.of("keys_file", f"{path} mode {mode:o}", "must be private (600)", fix)
    try:
        content = read_json(path)
    except ValueError as error:
        raise ConfigError.of("keys_file", str(path), "must be JSON", fix) from error
    if not isinstance(content, dict) or set(content) != {"api", "admin"}:
        raise ConfigError.of("keys_file", str(path), "must hold 'api' and 'admin' only", fix)
    api, admin = content["api"], content["admin"]
    if not (isinstance(api, str) and isinstance(admin, str) and api and admin and api != admin):
        raise ConfigError.of("keys_file", str(path), "keys must be two different texts", fix)
    return ServerKeys(api, admin)
