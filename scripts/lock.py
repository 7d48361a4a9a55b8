"""Resolve the CPU locks: `make lock`.

uv resolves the versions from package metadata alone (no wheel is downloaded), keeping the versions
already in the lock unless `--upgrade` is given. pip then names the one wheel it would install for
each pin and that wheel's SHA-256. The output is complete, so it is installed with
`--no-deps --require-hashes`.

    locks/cpu.in + extras of pyproject.toml  ->  locks/cpu.lock
    extra `launch` on top of cpu.lock        ->  locks/launch-cpu.lock (only what cpu.lock lacks)
    locks/megatron-latest.in + extra learner ->  locks/megatron-latest.lock (Python 3.12)
    transformer-engine, its Python part      ->  locks/megatron-latest-te.lock (Python 3.12)

Left out: torch (locks/torch-cpu.txt says why) and any platform but x86_64 Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
PYTHON_VERSION = "3.11"
PLATFORM = "x86_64-manylinux_2_34"
CPU_EXTRAS = ("learner", "rollout", "dev")
# The running interpreter is enough to resolve for another one, so uv need not fetch any.
UV_COMPILE = (
    *(sys.executable, "-m", "uv", "pip", "compile", "--quiet"),
    *("--python", sys.executable, "--no-python-downloads", "--system-certs"),
)
HEADER = "# Made by `make lock` for Python {}, x86_64 Linux, CPU. Do not edit.\n"

LATEST_PYTHON_VERSION = "3.12"
# Without its binaries, which need CUDA: what the tests build Transformer Engine's modules with.
TE_PINS = ["transformer-engine==2.20.2"]


def project_requirements(extras: tuple[str, ...]) -> list[str]:
    """Requirements of the project with the given extras, as pyproject.toml spells them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    return requirements


def listed(name: str) -> list[str]:
    """The requirement lines of a file in locks/."""
    lines = (LOCKS / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def resolve(
    requirements: list[str], keep: list[str], upgrade: bool, python: str = PYTHON_VERSION
) -> list[str]:
    """Resolve requirements to `name==version` lines.

    Args:
        requirements: requirement lines.
        keep: pins of the present lock; preferred unless `upgrade`.
        upgrade: take the newest versions that fit.
        python: for this version of Python.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.in")
        wanted.write_text("\n".join(requirements) + "\n")
        pins = Path(folder, "pins.txt")
        pins.write_text("\n".join(keep) + "\n")
        command = [
            *UV_COMPILE,
            *("--config-file", str(LOCKS / "uv.toml"), "--only-binary", ":all:"),
            *("--python-version", python, "--python-platform", PLATFORM),
            *("--no-header", "--no-annotate", "--output-file", str(pins), str(wanted)),
        ]
        if upgrade:
            command.append("--upgrade")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return pins.read_text().split()


def with_hashes(pins: list[str], python: str = sys.executable) -> str:
    """Lock text: every pin with the SHA-256 of the wheel pip would install for it.

    Args:
        pins: `name==version` lines.
        python: the interpreter whose pip chooses.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "pins.txt")
        wanted.write_text("\n".join(pins) + "\n")
        report = Path(folder, "report.json")
        command = [
            *(python, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"),
            *("--ignore-installed", "--only-binary", ":all:", "--report", str(report)),
            *("-r", str(wanted)),
        ]
        subprocess.run(command, check=True)
        installs = json.loads(report.read_text())["install"]
    lines = []
    for entry in installs:
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        sha256 = entry["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name.lower().replace('_', '-')}=={version} --hash=sha256:{sha256}")
    return "\n".join(sorted(lines)) + "\n"


def pins_of(lock: Path) -> list[str]:
    """The `name==version` parts of a lock; none when it does not exist yet."""
    if not lock.is_file():
        return []
    lines = lock.read_text().splitlines()
    return [line.split()[0] for line in lines if line and not line.startswith("#")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    parser.add_argument("--latest-python", default="python3.12", help="of locks/megatron-latest*")
    arguments = parser.parse_args()
    upgrade, python = arguments.upgrade, arguments.latest_python

    wanted = listed("cpu.in") + project_requirements(CPU_EXTRAS)
    cpu = resolve(wanted, pins_of(LOCKS / "cpu.lock"), upgrade)
    (LOCKS / "cpu.lock").write_text(HEADER.format(PYTHON_VERSION) + with_hashes(cpu))
    print(f"locks/cpu.lock: {len(cpu)} pins")

    launch_in = cpu + project_requirements(("launch",))
    both = resolve(launch_in, pins_of(LOCKS / "launch-cpu.lock"), upgrade)
    launch = [pin for pin in both if pin not in cpu]
    (LOCKS / "launch-cpu.lock").write_text(HEADER.format(PYTHON_VERSION) + with_hashes(launch))
    print(f"locks/launch-cpu.lock: {len(launch)} pins on top of cpu.lock")

    wanted = listed("megatron-latest.in") + project_requirements(("learner",))
    keep = pins_of(LOCKS / "megatron-latest.lock") or cpu
    latest = resolve(wanted, keep, upgrade, LATEST_PYTHON_VERSION)
    header = HEADER.format(LATEST_PYTHON_VERSION)
    (LOCKS / "megatron-latest.lock").write_text(header + with_hashes(latest, python))
    (LOCKS / "megatron-latest-te.lock").write_text(header + with_hashes(TE_PINS, python))
    print(f"locks/megatron-latest.lock: {len(latest)} pins")


if __name__ == "__main__":
    main()
