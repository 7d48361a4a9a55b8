"""Which Megatron-Core versions the layout suite was run on; any other is refused."""

from __future__ import annotations

from importlib import metadata

from opd_megatron.errors import ConfigError

# The newest for Python 3.11 (`make test`) and the newest for Python 3.12 (`make test-megatron-latest`).
TESTED_VERSIONS = ("0.16.1", "0.19.2")


def megatron_version() -> str:
    """The installed version.

    Raises:
        ConfigError: megatron-core is not installed.
    """
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "megatron-core: not installed in this environment; install the `learner` extra"
        ) from None


def check_version() -> str:
    """Return the installed version.

    Raises:
        ConfigError: not one of `TESTED_VERSIONS`.
    """
    version = megatron_version()
    if version not in TESTED_VERSIONS:
        raise ConfigError.of(
            "megatron-core",
            version,
            f"tested versions are {', '.join(TESTED_VERSIONS)}",
            "install one of them; or run tests/real/test_megatron_*.py and tests/unit/megatron on this "
            "one and, when they pass, add it to opd_megatron/megatron/version.py",
        )
    return version
