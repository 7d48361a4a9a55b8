"""Resolve the CPU lock: `make lock`.

uv resolves the versions from package metadata alone (no wheel is downloaded), keeping the versions
already in the lock unless `--upgrade` is given. pip then names the one wheel it would install for
each pin and that wheel's SHA-256. The output is complete, so it is installed with
`--no-deps --require-hashes`.

    locks/cpu.in + extras of pyproject.toml  ->  locks/cpu.lock
    extra `launch` on top of cpu.lock        ->  locks/launch-cpu.lock (only what cpu.lock lacks)

Left out: torch (locks/torch-cpu.txt says why) and any platform but x86_64 Linux with Python 3.11.
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
HEADER = "# Made by `make lock` for Python 3.11, x86_64 Linux, CPU. Do not edit.\n"


def project_requirements(extras: tuple[str, ...]) -> list[str]:
    """Requirements of the project with the given extras, as pyproject.toml spells them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    return requirements


def resolve(requirements: list[str], keep: list[str], upgrade: bool) -> list[str]:
    """Resolve requirements to `name==version` lines.

    Args:
        requirements: requirement lines.
        keep: pins of the present lock; preferred unless `upgrade`.
        upgrade: take the newest versions that fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.in")
        wanted.write_text("\n".join(requirements) + "\n")
        pins = Path(folder, "pins.txt")
        pins.write_text("\n".join(keep) + "\n")
        command = [
            *UV_COMPILE,
            *("--config-file", str(LOCKS / "uv.toml"), "--only-binary", ":all:"),
            *("--python-version", PYTHON_VERSION, "--python-platform", PLATFORM),
            *("--no-header", "--no-annotate", "--output-file", str(pins), str(wanted)),
        ]
        if upgrade:
            command.append("--upgrade")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return pins.read_text().split()


def with_hashes(pins: list[str]) -> str:
    """Lock text: every pin with the SHA-256 of the wheel pip would install for it."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "pins.txt")
        listed.write_text("\n".join(pins) + "\n")
        report = Path(folder, "report.json")
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"),
            *("--ignore-installed", "--only-binary", ":all:", "--report", str(report)),
            *("-r", str(listed)),
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
    upgrade = parser.parse_args().upgrade

    cpu_in = [
        line
        for line in (LOCKS / "cpu.in").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    wanted = cpu_in + project_requirements(CPU_EXTRAS)
    cpu = resolve(wanted, pins_of(LOCKS / "cpu.lock"), upgrade)
    (LOCKS / "cpu.lock").write_text(HEADER + with_hashes(cpu))
    print(f"locks/cpu.lock: {len(cpu)} pins")

    launch_in = cpu + project_requirements(("launch",))
    both = resolve(launch_in, pins_of(LOCKS / "launch-cpu.lock"), upgrade)
    launch = [pin for pin in both if pin not in cpu]
    (LOCKS / "launch-cpu.lock").write_text(HEADER + with_hashes(launch))
    print(f"locks/launch-cpu.lock: {len(launch)} pins on top of cpu.lock")


if __name__ == "__main__":
    main()
