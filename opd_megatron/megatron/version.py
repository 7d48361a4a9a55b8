"""Which Megatron-Core the layout suite was run on, and what must not lie beside it. No torch."""

from __future__ import annotations

from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from opd_megatron.errors import ConfigError

# The newest for Python 3.11 (`make test`) and the newest for Python 3.12 (`make test-megatron-latest`).
TESTED_VERSIONS = ("0.16.1", "0.19.2")

# Both are subpackages of NVIDIA Apex and of nothing else that is called apex.
_NVIDIA_APEX_PACKAGES = ("normalization", "optimizers")


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


def is_nvidia_apex(folder: Path) -> bool:
    """Whether a package called apex is NVIDIA's; the package index has an unrelated one."""
    return all((folder / name / "__init__.py").is_file() for name in _NVIDIA_APEX_PACKAGES)


def check_apex() -> None:
    """NVIDIA Apex may be there, nothing else of that name: Megatron-Core takes its optimizers and kernels from it.

    Raises:
        ConfigError: another package called apex could be imported.
    """
    spec = PathFinder.find_spec("apex")
    if spec is None:
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(is_nvidia_apex(folder) for folder in folders):
        seen = str(folders[0]) if folders else spec.origin
        raise ConfigError.of(
            "apex",
            seen,
            "is not NVIDIA Apex but an unrelated package of that name, which Megatron-Core would import",
            "pip uninstall apex",
        )
