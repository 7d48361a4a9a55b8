"""Checkpoints that are either whole or not there.

    checkpoints/.step_000020.tmp/     the learner writes model/ here, the controller controller.json
    checkpoints/step_000020/          the same, after manifest.json, fsync and rename: this is the commit

`manifest.json` holds every file's size and SHA-256, the fingerprint of the recipe, and its own hash. Readers take
the newest commit that verifies; a damaged one is named and skipped. Old commits go only after a newer one is
durable. A run that has commits of which none verifies stops: it never restarts from fresh weights in silence.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opd_megatron.atomic import fsync_dir, fsync_file, read_json, write_json
from opd_megatron.errors import CheckpointError

FORMAT = "opd-commit-1"
MANIFEST = "manifest.json"
CONTROLLER = "controller.json"
MODEL = "model"
_HASHING_THREADS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Commit:
    """A verified checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]
    fingerprint: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.path / MODEL


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _readable_hash(path: Path) -> str:
    """`sha256_file` of a file that may be on a failing disk."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _body_hash(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _in_threads(work: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """`work` of every file, several at a time: the learner writes a file a rank, and hashing leaves other threads the
    interpreter. The first error in the order of the files is raised.
    """
    with ThreadPoolExecutor(_HASHING_THREADS, "hashing") as threads:
        return list(threads.map(work, paths))


def _durable_entry(path: Path) -> dict[str, Any]:
    """Make a file's content durable; what the manifest says of it."""
    fsync_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def begin(root: Path, step: int) -> Path:
    """Make the empty temporary folder of a commit and return it; what earlier tries left is removed."""
    if not root.is_dir():
        root.mkdir(parents=True)
        fsync_dir(root.parent)
    for left in root.glob(".step_*.tmp"):
        shutil.rmtree(left)
    temporary = root / f".{_name(step)}.tmp"
    (temporary / MODEL).mkdir(parents=True)
    return temporary


def finish(
    root: Path, step: int, state: dict[str, Any], fingerprint: dict[str, Any], keep: int
) -> Path:
    """Turn the temporary folder into a commit, then remove commits older than the newest `keep`.

    Commits of later steps are removed too: a run that is at `step` went on from an older commit because they were
    damaged, and they must not be counted among the ones to keep.
    """
    temporary = root / f".{_name(step)}.tmp"
    write_json(temporary / CONTROLLER, state)
    paths = _files(temporary)
    entries = _in_threads(_durable_entry, paths)
    files = {
        path.relative_to(temporary).as_posix(): entry
        for path, entry in zip(paths, entries, strict=True)
    }
    body = {"format": FORMAT, "step": step, "fingerprint": fingerprint, "files": files}
    write_json(temporary / MANIFEST, {**body, "sha256": _body_hash(body)})
    for folder in {p.parent for p in _files(temporary)} | {temporary}:
        fsync_dir(folder)
    final = root / _name(step)
    if final.exists():
        # A damaged commit of the same step, skipped on resume and now made again.
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_dir(root)
    steps = committed_steps(root)
    ours = [s for s in steps if s <= step]
    for other in set(steps) - set(ours[-keep:]):
        shutil.rmtree(root / _name(other))
    return final


def committed_steps(root: Path) -> list[int]:
    """Steps that have a commit folder, ascending; not verified."""
    if not root.is_dir():
        return []
    names = (p.name.removeprefix("step_") for p in root.iterdir() if p.name.startswith("step_"))
    return sorted(int(name) for name in names if name.isdigit())


def verify(path: Path) -> Commit:
    """Read one commit and check every file against the manifest.

    Raises:
        CheckpointError: anything missing, truncated or altered; the message names it.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: manifest unreadable: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a commit of format {FORMAT!r}")
    if manifest.pop("sha256", None) != _body_hash(manifest):
        raise CheckpointError(f"{path}: {MANIFEST} was altered (its own SHA-256 differs)")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {name} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
            )
    names = list(manifest["files"])
    for name, found in zip(
        names, _in_threads(_readable_hash, [path / n for n in names]), strict=True
    ):
        if found != manifest["files"][name]["sha256"]:
            raise CheckpointError(f"{path}: {name} was altered (SHA-256 differs from the manifest)")
    return Commit(
        path, int(manifest["step"]), read_json(path / CONTROLLER), manifest["fingerprint"]
    )


def newest(root: Path, report: Callable[[str], None]) -> Commit | None:
    """The newest commit that verifies, or None when there has never been one.

    Args:
        report: told about every damaged commit that is skipped.

    Raises:
        CheckpointError: there are commits, and none verifies.
    """
    steps = committed_steps(root)
    damage: list[str] = []
    for step in reversed(steps):
        try:
            return verify(root / _name(step))
        except CheckpointError as error:
            damage.append(str(error))
            report(f"commit skipped: {error}")
    if steps:
        raise CheckpointError(
            "no commit of this run verifies; restore one, or start a new run directory:\n"
            + "\n".join(damage)
        )
    return None


def refuse_changes(commit: Commit, fingerprint: dict[str, Any], allowed: set[str]) -> None:
    """A resumed run must be the same run: compare fingerprints key by key.

    Args:
        allowed: keys that may change between attempts (timeouts, display, more steps, the layout).

    Raises:
        CheckpointError: a diff of every key that may not change.
    """
    keys = sorted(set(commit.fingerprint) | set(fingerprint))
    changed = [
        f"  {key}: {commit.fingerprint.get(key)!r} -> {fingerprint.get(key)!r}"
        for key in keys
        if key not in allowed and commit.fingerprint.get(key) != fingerprint.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{commit.path.name} was made by another configuration; start a new run directory or undo:\n"
            + "\n".join(changed)
        )
