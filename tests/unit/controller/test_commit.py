"""A commit is whole or not there; damage is found, named, and the commit before is used."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from opd_megatron.controller import commit
from opd_megatron.errors import CheckpointError

STATE = {"step": 5, "ledger": {}}
MARKS = {"optimizer.lr": 1e-3, "steps": 80, "data": "abc"}


def make(root: Path, step: int, keep: int = 2) -> Path:
    folder = commit.begin(root, step)
    (folder / commit.MODEL / "weights.bin").write_bytes(bytes(range(256)) * step)
    (folder / commit.MODEL / "metadata.json").write_text("{}")
    return commit.finish(root, step, {**STATE, "step": step}, MARKS, keep)


def quiet(_: str) -> None:
    return None


def test_a_finished_commit_verifies(tmp_path: Path) -> None:
    make(tmp_path, 5)
    found = commit.newest(tmp_path, quiet)
    assert found is not None
    assert (found.step, found.state["step"], found.fingerprint) == (5, 5, MARKS)
    assert (found.model / "weights.bin").exists()


def test_no_commit_yet_is_not_an_error(tmp_path: Path) -> None:
    assert commit.newest(tmp_path / "checkpoints", quiet) is None


def test_an_unfinished_commit_is_invisible_and_swept_by_the_next_try(tmp_path: Path) -> None:
    make(tmp_path, 5)
    folder = commit.begin(tmp_path, 10)
    (folder / commit.MODEL / "half").write_bytes(b"x")
    found = commit.newest(tmp_path, quiet)
    assert found is not None and found.step == 5
    assert not (commit.begin(tmp_path, 10) / commit.MODEL / "half").exists()


@pytest.mark.parametrize("seed", range(100))
def test_any_flipped_bit_truncation_or_missing_file_falls_back(tmp_path: Path, seed: int) -> None:
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    rng = random.Random(seed)
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    victim = rng.choice(files)
    content = bytearray(victim.read_bytes())
    kind = rng.choice(["flip", "cut", "remove"])
    if kind == "remove":
        victim.unlink()
    elif kind == "cut":
        victim.write_bytes(content[: rng.randrange(len(content))])
    else:
        index = rng.randrange(len(content))
        content[index] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
    said: list[str] = []
    found = commit.newest(tmp_path, said.append)
    assert found is not None and found.step == 5
    assert "step_000010" in said[0]


def test_when_nothing_verifies_the_run_stops_instead_of_starting_over(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    (path / commit.MODEL / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no commit of this run verifies"):
        commit.newest(tmp_path, quiet)


def test_old_commits_go_only_after_a_newer_one(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        make(tmp_path, step)
    assert commit.committed_steps(tmp_path) == [10, 15]


def test_a_damaged_commit_is_replaced_when_its_step_is_made_again(tmp_path: Path) -> None:
    make(tmp_path, 5)
    damaged = make(tmp_path, 10)
    (damaged / commit.MODEL / "weights.bin").unlink()
    make(tmp_path, 10)
    found = commit.newest(tmp_path, quiet)
    assert found is not None and found.step == 10


def test_a_changed_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    make(tmp_path, 5)
    found = commit.newest(tmp_path, quiet)
    assert found is not None
    commit.refuse_changes(found, {**MARKS, "steps": 100}, allowed={"steps"})
    with pytest.raises(CheckpointError) as raised:
        commit.refuse_changes(
            found, {**MARKS, "optimizer.lr": 1e-4, "data": "abd"}, allowed={"steps"}
        )
    assert "optimizer.lr: 0.001 -> 0.0001" in str(raised.value)
    assert "data: 'abc' -> 'abd'" in str(raised.value)


def test_what_any_killed_save_left_is_swept_by_the_next_one(tmp_path: Path) -> None:
    make(tmp_path, 5)
    commit.begin(tmp_path, 10)
    make(tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000005", "step_000008"]


def test_damaged_commits_of_an_abandoned_future_do_not_count_among_those_to_keep(
    tmp_path: Path,
) -> None:
    make(tmp_path, 5)
    (make(tmp_path, 10) / commit.MODEL / "weights.bin").unlink()
    found = commit.newest(tmp_path, quiet)
    assert found is not None and found.step == 5
    make(tmp_path, 7)
    assert commit.committed_steps(tmp_path) == [5, 7]
