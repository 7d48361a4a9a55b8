"""What Megatron and torch raise inside a checkpoint: whose fault it is decides whether the run may be tried again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opd_megatron.errors import (
    EXIT_CONFIG,
    EXIT_RETRY,
    CheckpointError,
    ContractError,
    StorageError,
)
from opd_megatron.megatron.checkpoint_errors import told_apart

FOLDER = Path("step_000004/model")
NO_ROOM = OSError(errno.ENOSPC, "No space left on device", "__1_0.distcp")


def collected(cause: BaseException) -> CheckpointException:
    """As torch gathers it from the ranks; the first one is fine."""
    return CheckpointException("read", {1: (cause, None)})  # pyright: ignore[reportArgumentType]


def raised_for(error: BaseException) -> BaseException:
    with pytest.raises(BaseException) as seen, told_apart(FOLDER, "can not be loaded"):
        raise error
    return seen.value


@pytest.mark.parametrize("error", [KeyError("model"), collected(ValueError("bad magic"))])
def test_damage_is_an_error_that_another_try_meets_again(error: BaseException) -> None:
    seen = raised_for(error)
    assert isinstance(seen, CheckpointError) and seen.exit_code == EXIT_CONFIG
    assert str(FOLDER) in str(seen) and "can not be loaded" in str(seen)


@pytest.mark.parametrize("error", [NO_ROOM, collected(NO_ROOM)])
def test_a_full_disk_is_an_error_of_storage(error: BaseException) -> None:
    seen = raised_for(error)
    assert isinstance(seen, StorageError) and seen.exit_code == EXIT_RETRY
    assert "__1_0.distcp" in str(seen)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:99"),
        dist.DistNetworkError("Broken pipe"),
        ContractError("a save is not finished"),
    ],
)
def test_the_end_of_a_peer_and_our_own_errors_stay_what_they_are(error: Exception) -> None:
    assert raised_for(error) is error


def test_the_rank_that_failed_is_named() -> None:
    assert "rank 1: can not be loaded: ValueError" in str(raised_for(collected(ValueError("x"))))
