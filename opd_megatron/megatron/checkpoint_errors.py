"""What goes wrong inside Megatron's and torch's checkpoint code, as errors of ours.

    of the files            CheckpointError: another try meets it again
    no room, a failing disk StorageError
    a peer that ended       as it is: its own reason is posted, or it was killed; another try helps

torch collects what ranks raise in a `CheckpointException`, which is no `Exception`, so a plain handler misses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opd_megatron.errors import CheckpointError, OpdError, StorageError

# gloo's errors are plain RuntimeErrors that name the line of its source.
_GLOO = "gloo/transport"


def _is_of_a_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or _GLOO in str(error)


@contextmanager
def told_apart(directory: Path, what: str) -> Iterator[None]:
    """Raise what happens inside by its kind, see above.

    Args:
        what: goes on the message, e.g. "can not be loaded".

    Raises:
        CheckpointError, StorageError: see above.
    """
    try:
        yield
    except OpdError:
        raise
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise _of(cause, directory, f"rank {rank}: {what}") from error
    except Exception as error:
        if _is_of_a_peer(error):
            raise
        raise _of(error, directory, what) from error


def _of(error: BaseException, directory: Path, what: str) -> OpdError:
    return StorageError.of(error) or CheckpointError(f"{directory}: {what}: {error!r}")
