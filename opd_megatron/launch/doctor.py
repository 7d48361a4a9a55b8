"""Checks of this machine and environment, as a list of results: what `opd doctor` prints.

Nothing is imported to be checked: versions come from package metadata, builds from files on the
path. So the answer comes at once on a login node, and a broken package can not break its own check.
A role that is not installed is no fault (a login node needs none); a wrong version, or a package
that must not be there, is.

Left out: whether kernels run, networks between nodes, and models (`opd validate` reads those).
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import psutil
from packaging.version import Version

from opd_megatron.errors import ServerError
from opd_megatron.launch.ports import PortReservations
from opd_megatron.megatron.version import TESTED_VERSIONS as TESTED_MEGATRON
from opd_megatron.megatron.version import is_nvidia_apex

# The response contract and the CPU stand-ins were checked against exactly these.
TESTED_SGLANG = ("0.5.23",)
TRANSFORMERS_LOW, TRANSFORMERS_BELOW = "5.12", "6"
# leptonai 0.47 removed leptonai.api.v1, which nemo-run 0.11 imports at start.
LEPTONAI_LOW, LEPTONAI_BELOW = "0.26.6", "0.47"
PYTHON_LOW, PYTHON_BELOW = (3, 11), (3, 14)
MIN_GLIBC = "2.34"
# Two SGLang servers and two learner ranks on tiny models.
MIN_MEMORY_GIB = 6.0
MIN_FREE_DISK_GIB = 2.0

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of `opd doctor`. `fix` is what to do, empty when `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


SearchPath = Sequence[str] | None  # None: this interpreter's sys.path


def installed_version(distribution: str, path: SearchPath = None) -> str | None:
    """Version of an installed distribution, or None."""
    found = metadata.distributions(name=distribution, path=list(sys.path if path is None else path))
    return next((entry.version for entry in found), None)


def package_folder(module: str, path: SearchPath = None) -> Path | None:
    """Folder of a top-level package that could be imported, without importing it."""
    spec = PathFinder.find_spec(module, path)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def check_python(
    version: tuple[int, int] = sys.version_info[:2], caches: bool = not sys.dont_write_bytecode
) -> CheckResult:
    """Python is one of the supported minor versions; whether it keeps what it compiled is said, not judged."""
    seen = ".".join(map(str, version))
    if PYTHON_LOW <= version < PYTHON_BELOW:
        detail = f"{platform.python_version()} at {sys.executable}"
        if not caches:
            detail += "; PYTHONDONTWRITEBYTECODE is set: unless packages are compiled, starts take twice as long"
        return CheckResult("python", True, detail)
    return CheckResult("python", False, seen, "use Python 3.11, 3.12 or 3.13")


def check_glibc(version: str = platform.libc_ver()[1]) -> CheckResult:
    """The C library is new enough for SGLang's wheel."""
    if not version:
        return CheckResult("glibc", False, "no GNU C library", "use a glibc-based Linux")
    if Version(version) >= Version(MIN_GLIBC):
        return CheckResult("glibc", True, version)
    return CheckResult(
        "glibc",
        False,
        f"{version}, older than {MIN_GLIBC}, which SGLang's wheel needs",
        "use Debian 12, Ubuntu 22.04, RHEL 9 or newer, or a container of one",
    )


def torch_cuda(path: SearchPath = None) -> str | None:
    """CUDA version torch was built for, from torch/version.py; None for a CPU build.

    Raises:
        FileNotFoundError: torch is not installed.
    """
    folder = package_folder("torch", path)
    if folder is None:
        raise FileNotFoundError("torch is not installed")
    for node in ast.parse((folder / "version.py").read_text()).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else []
        targets = node.targets if isinstance(node, ast.Assign) else targets
        named = [target.id for target in targets if isinstance(target, ast.Name)]
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if "cuda" in named and isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
    return None


def check_torch(path: SearchPath = None) -> CheckResult:
    """Torch and its build; a CUDA build on a machine without a driver is told, not refused."""
    version = installed_version("torch", path)
    if version is None:
        return _absent("torch", "learner")
    cuda = torch_cuda(path)
    driver = Path("/proc/driver/nvidia/version").exists()
    if cuda is None:
        return CheckResult("torch", True, f"{version}, CPU build: recipes with device=cpu only")
    seen = "NVIDIA driver loaded" if driver else "no NVIDIA driver: recipes with device=cpu only"
    return CheckResult("torch", True, f"{version}, CUDA {cuda}, {seen}")


def check_allowed(
    distribution: str, allowed: Sequence[str], extra: str, path: SearchPath = None
) -> CheckResult:
    """A distribution whose exact version must be one of those the tests were run on."""
    version = installed_version(distribution, path)
    if version is None:
        return _absent(distribution, extra)
    if version in allowed:
        return CheckResult(distribution, True, version)
    return CheckResult(
        distribution,
        False,
        f"{version}; tested: {', '.join(allowed)}",
        f"install {' or '.join(f'{distribution}=={one}' for one in allowed)}: see locks/README.md",
    )


def check_range(
    distribution: str, low: str, below: str, extra: str, path: SearchPath = None
) -> CheckResult:
    """A distribution with `low` <= version < `below`."""
    version = installed_version(distribution, path)
    if version is None:
        return _absent(distribution, extra)
    if Version(low) <= Version(version) < Version(below):
        return CheckResult(distribution, True, version)
    return CheckResult(
        distribution,
        False,
        f"{version}; must be at least {low} and below {below}",
        f"pip install '{distribution}>={low},<{below}'",
    )


def check_apex(path: SearchPath = None) -> CheckResult:
    """NVIDIA Apex may be there; the package index's `apex` (a web login library) must not be.

    Megatron-Core imports `apex` where it finds one, so the foreign one would break the learner.
    """
    version = installed_version("apex", path)
    folder = package_folder("apex", path)
    if version is None and folder is None:
        return CheckResult("apex", True, "not installed; torch's own kernels are used")
    if folder is not None and is_nvidia_apex(folder):
        return CheckResult("apex", True, f"NVIDIA Apex {version or 'of unknown version'}")
    return CheckResult(
        "apex",
        False,
        f"{version or folder} is not NVIDIA Apex but an unrelated package of that name",
        "pip uninstall apex",
    )


def check_transformer_engine(path: SearchPath = None) -> CheckResult:
    """Transformer Engine is whole: the package and its torch binding, of one version."""
    version = installed_version("transformer-engine", path)
    if version is None:
        return _absent("transformer-engine", "fp8")
    binding = installed_version("transformer-engine-torch", path)
    if binding == version:
        return CheckResult("transformer-engine", True, version)
    return CheckResult(
        "transformer-engine",
        False,
        f"{version} with transformer-engine-torch {binding or 'not installed'}",
        f"pip install --no-build-isolation transformer-engine-torch=={version}",
    )


def check_nemo_run(path: SearchPath = None) -> CheckResult:
    """NeMo-Run together with a leptonai that it can import."""
    version = installed_version("nemo-run", path)
    if version is None:
        return _absent("nemo-run", "launch")
    leptonai = check_range("leptonai", LEPTONAI_LOW, LEPTONAI_BELOW, "launch", path)
    if leptonai.ok and installed_version("leptonai", path) is not None:
        return CheckResult("nemo-run", True, f"{version} with leptonai {leptonai.detail}")
    return CheckResult(
        "nemo-run",
        False,
        f"{version} cannot be imported: leptonai {leptonai.detail}",
        f"pip install 'leptonai>={LEPTONAI_LOW},<{LEPTONAI_BELOW}'",
    )


def check_ports() -> CheckResult:
    """A run can take the loopback ports it needs."""
    try:
        with PortReservations() as ports:
            seen = [ports.reserve() for _ in range(4)]
    except (ServerError, OSError) as error:
        return CheckResult("loopback ports", False, str(error), "end runs that hold the ports")
    return CheckResult("loopback ports", True, f"free, e.g. {seen[0]}")


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take: available memory, or what its control group leaves."""
    available = psutil.virtual_memory().available
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def check_memory(available: int | None = None) -> CheckResult:
    """Memory for the demo, and the cores that go with it."""
    gib = (memory_limit() if available is None else available) / _GIB
    cores = len(os.sched_getaffinity(0))
    detail = f"{gib:.1f} GiB available, {cores} cores"
    if gib >= MIN_MEMORY_GIB:
        return CheckResult("memory", True, detail)
    return CheckResult(
        "memory",
        False,
        f"{detail}; the demo needs {MIN_MEMORY_GIB:.0f} GiB",
        "end other programs or raise the limit of the container or job",
    )


def check_disk(folder: Path | None = None) -> CheckResult:
    """Room for a run directory where the command was started."""
    where = (folder or Path.cwd()).resolve()
    free_gib = shutil.disk_usage(where).free / _GIB
    if free_gib >= MIN_FREE_DISK_GIB:
        return CheckResult("disk", True, f"{free_gib:.0f} GiB free at {where}")
    return CheckResult(
        "disk",
        False,
        f"{free_gib:.1f} GiB free at {where}; the demo needs {MIN_FREE_DISK_GIB:.0f} GiB",
        "free some space, or give --run-dir on another file system",
    )


def check_hf_home(value: str | None = None) -> CheckResult:
    """HF_HOME, where it is set, is a folder that can be written."""
    value = os.environ.get("HF_HOME") if value is None else value
    if not value:
        return CheckResult("HF_HOME", True, "not set; models are given by path")
    if Path(value).is_dir() and os.access(value, os.W_OK):
        return CheckResult("HF_HOME", True, value)
    return CheckResult("HF_HOME", False, f"{value} is no writable folder", "create it, or unset it")


def run_checks() -> list[CheckResult]:
    """All checks, in the order they are shown."""
    return [
        check_python(),
        check_glibc(),
        check_torch(),
        check_allowed("megatron-core", TESTED_MEGATRON, "learner"),
        check_allowed("sglang", TESTED_SGLANG, "rollout"),
        check_range("transformers", TRANSFORMERS_LOW, TRANSFORMERS_BELOW, "learner"),
        check_apex(),
        check_transformer_engine(),
        check_nemo_run(),
        check_ports(),
        check_memory(),
        check_disk(),
        check_hf_home(),
    ]


def _absent(name: str, extra: str) -> CheckResult:
    return CheckResult(name, True, f"not installed (extra `{extra}`)")
