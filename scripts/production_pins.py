"""Prove that the production pins resolve: `make production-pins` (`ARGS=--write` rewrites them).

For each platform, uv resolves locks/production.in and the project's extras together for Python
3.12, from package metadata alone: no wheel is downloaded and nothing is built. The result must
equal locks/production-PLATFORM.txt, line by line, where each pin says which package asks for it.

Every pin must have a wheel for the platform, except `transformer-engine-torch`: it is published as
source and compiled on the machine (or in the container) against its torch and CUDA toolkit. Its
metadata takes part in the resolution; that it compiles is not shown here. Nor is anything run: this
proves versions only.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

from lock import LOCKS, UV_COMPILE, project_requirements

PYTHON_VERSION = "3.12"
PLATFORMS = ("x86_64", "aarch64")
GLIBC = "manylinux_2_34"  # SGLang's wheels need it
EXTRAS = ("learner", "fp8", "rollout", "launch")
SOURCE_ONLY = "transformer-engine-torch"
# Names on the package index that are not what the name suggests.
REFUSED = ("apex",)


def resolve(platform: str, present: str) -> str:
    """Resolve production.in for one platform.

    Args:
        platform: machine name, e.g. "aarch64".
        present: pins to keep where they still fit.

    Returns:
        `name==version  # via who` lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "opd-megatron.in")
        wanted.write_text("\n".join(project_requirements(EXTRAS)) + "\n")
        pins = Path(folder, "pins.txt")
        pins.write_text(present)
        command = [
            *(*UV_COMPILE, "--no-config"),
            *("--python-version", PYTHON_VERSION),
            *("--python-platform", f"{platform}-{GLIBC}"),
            *("--only-binary", ":all:", "--no-binary", SOURCE_ONLY),
            *("--no-header", "--annotation-style", "line"),
            *("--output-file", str(pins), "production.in", str(wanted)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=LOCKS)
        return pins.read_text().replace(f"-r {wanted}", "opd-megatron")


def check(platform: str, write: bool) -> bool:
    """Compare one platform's file with a fresh resolution (`write`: replace it). True when good."""
    path = LOCKS / f"production-{platform}.txt"
    present = path.read_text() if path.is_file() else ""
    resolved = resolve(platform, present)
    names = [line.split("==")[0] for line in resolved.splitlines() if "==" in line]
    refused = [name for name in REFUSED if name in names]
    if refused:
        print(f"{path.name}: {', '.join(refused)} must never be installed from the package index")
        return False
    if write:
        path.write_text(resolved)
    elif resolved != present:
        changes = difflib.unified_diff(
            present.splitlines(), resolved.splitlines(), path.name, "resolved now", lineterm=""
        )
        print("\n".join(changes))
        return False
    print(
        f"locks/{path.name}: {len(names)} pins resolve together for Python {PYTHON_VERSION}, "
        f"{len(names) - 1} as wheels, {SOURCE_ONLY} from source"
    )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the files")
    write = parser.parse_args().write
    good = [check(platform, write) for platform in PLATFORMS]  # every platform is shown
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
