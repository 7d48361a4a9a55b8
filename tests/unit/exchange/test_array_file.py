"""Arrays on disk: what another reader finds, how much memory writing takes, and what a full disk is."""

from __future__ import annotations

import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from opd_megatron.errors import StorageError
from opd_megatron.exchange.array_file import write_arrays
from opd_megatron.exchange.batch_file import read_whole, write_batch
from opd_megatron.types import Rollout, Sample, TeacherScores

ARRAYS = {
    "flags": np.asarray([1, 0, 1], np.uint8),
    "ids": np.arange(10, dtype=np.int32).reshape(5, 2)[:, ::-1],
    "offsets": np.asarray([0, 2**40], np.int64),
    "logprobs": np.linspace(-3, 0, 7, dtype=np.float32),
    "nothing": np.zeros((0, 3), np.float32),
    "big_endian": np.asarray([1.5, -2.0], ">f4"),
}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "arrays"
    write_arrays(path, ARRAYS, {"step": "7"})
    found = load_file(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"step": "7"}
        assert file.get_slice("ids")[1:3].tolist() == [[3, 2], [5, 4]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["arrays"]


def sample(number: int, length: int, topk: int) -> Sample:
    rollout = Rollout(
        f"p{number}#0", f"p{number}", (1,), tuple([2] * length), np.zeros(length, np.float32),
        "stop", 0, 0, "s",
    )  # fmt: skip
    ids = np.full((length, topk), number, np.int32)
    return Sample(rollout, TeacherScores("t", np.zeros(length, np.float32), ids, ids * -0.5))


def test_a_step_batch_takes_the_memory_of_one_copy(tmp_path: Path) -> None:
    samples = [sample(number, 4096, 64) for number in range(8)]
    path = tmp_path / "batch"
    tracemalloc.start()
    try:
        write_batch(path, 1, 0, samples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.6 * path.stat().st_size


def test_a_top_k_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_megatron.exchange.batch_file._ROWS_AT_ONCE", 5)
    path = tmp_path / "batch"
    write_batch(path, 1, 0, [sample(1, 7, 2), sample(2, 6, 2)])
    seen: list[int] = []

    def entropy_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(len(rows))
        return rows[:, 1]

    whole = read_whole(path, entropy_of=entropy_of)
    assert seen == [5, 5, 3]
    assert whole.teacher_entropy is not None
    assert whole.teacher_entropy.tolist() == [-0.5] * 7 + [-1.0] * 6
    assert read_whole(path).teacher_entropy is None
    write_batch(path, 1, 0, [sample(1, 0, 2)])
    assert read_whole(path, entropy_of=entropy_of).teacher_entropy is not None


def test_a_full_disk_is_a_storage_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "arrays"
    write_arrays(path, ARRAYS, {})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError) as raised:
            write_arrays(path, {"large": np.zeros(4096, np.float32)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert StorageError.of(raised.value) is not None
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["arrays"]
