"""Which Megatron-Core versions the layout suite was run on; any other is refused."""

from __future__ import annotations

from importlib import metadata

from opd_megatron.errors import ConfigError

TESTED_VERSIONS = ("0.16.1",)


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
            "install one of them, or run tests/real/test_megatron_*.py on this one and add it to "
            "opd_megatron/megatron/version.py",
        )
    return version
