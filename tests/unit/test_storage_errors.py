"""A full disk is one message and exit code 75; other operating system errors stay defects."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from opd_megatron.atomic import write_bytes
from opd_megatron.errors import EXIT_RETRY, StorageError


def test_a_write_that_does_not_fit_is_a_storage_error_that_names_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_bytes(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError) as raised:
            write_bytes(path, b"x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = StorageError.of(raised.value)
    assert error is not None and error.exit_code == EXIT_RETRY
    assert "File too large" in str(error) and "make room" in str(error)
    assert path.read_bytes() == b"old"


def test_other_errors_of_the_operating_system_are_not_about_storage() -> None:
    assert StorageError.of(ConnectionRefusedError(111, "Connection refused")) is None
