"""A full disk is one message and exit code 75; other operating system errors stay defects."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from opd_megatron.atomic import write_bytes
from opd_megatron.errors import EXIT_RETRY, StorageError


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Files can not grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_does_not_fit_is_a_storage_error_that_names_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_bytes(path, b"old")
    with at_most(1024), pytest.raises(OSError) as raised:
        write_bytes(path, b"x" * 4096)
    error = StorageError.of(raised.value)
    assert error is not None and error.exit_code == EXIT_RETRY
    assert "File too large" in str(error) and "make room" in str(error)
    assert path.read_bytes() == b"old"


def test_a_tensor_that_does_not_fit_is_a_storage_error_whatever_its_writer_says(
    tmp_path: Path,
) -> None:
    with (
        (tmp_path / "part").open("wb", buffering=0) as file,
        at_most(100_000),
        pytest.raises(RuntimeError, match="unexpected pos") as raised,
    ):
        torch.save(torch.zeros(100_000), file)
    assert "File too large" in str(StorageError.of(raised.value))


def test_other_errors_of_the_operating_system_are_not_about_storage() -> None:
    assert StorageError.of(ConnectionRefusedError(111, "Connection refused")) is None
    assert StorageError.of(RuntimeError("unexpected pos 704 vs 598")) is None
