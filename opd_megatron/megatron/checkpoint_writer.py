"""How a rank writes its file of a distributed checkpoint: in this process, now or in a thread from a copy.

Megatron's own save starts a spawned manager process and one forked writer per file, about four seconds whatever the
size; its asynchronous one forks a process that has gloo threads, which may hold a lock for ever in the child, or
starts one that imports everything again. `InProcessStrategy` runs the same writer function in this process instead,
one file per rank. Planning before and finalising after it are collective and stay in the thread that calls Megatron.

    plan (collective)  ->  copy to the host  ->  write and fsync, in a thread  ->  all ranks done?  ->  finalise

The files of a save that is under way have no metadata.json, so nobody can mistake them for a checkpoint.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from opd_megatron.errors import CheckpointError, StorageError
from opd_megatron.megatron.checkpoint_errors import told_apart


def _write_buckets(transforms: list[Any], buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Megatron's writer for each file, in this process; collects what its parent would."""
    collected: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        answers: Any = queue.Queue()
        unfinished: Any = queue.Queue()
        unfinished.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, unfinished, use_fsync=True
        )
        _, answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        collected[number] = answer
    results.put(collected)


class InProcessStrategy(TorchDistSaveShardedStrategy):
    """The stock format, written without helper processes."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, *_: Any) -> AsyncRequest:
        stock = super().async_save
        # From Megatron-Core 0.17 on a package that need not be there is the default.
        has_choice = "async_strategy" in inspect.signature(stock).parameters
        how = {"async_strategy": "mcore"} if has_choice else {}
        # The writer takes its results queue from here; a plain one serves a writer in this process.
        filesystem_async._results_queue = queue.Queue()
        try:
            return stock(sharded_state_dict, checkpoint_dir, **how)
        finally:
            filesystem_async._results_queue = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *details: Any) -> Any:
        stock = super()._get_save_and_finalize_callbacks(writer, *details)
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []

        def write(_: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
            _write_buckets(transforms, buckets, results)

        return stock._replace(async_fn=write if stock.async_fn is not None else None)


def _on_host(buckets: Sequence[Any], copied: bool) -> list[Any]:
    """The buckets with their tensors in host memory; `copied`: also those that are there already."""
    return [
        (path, key, (objects, [(item, tensor.to("cpu", copy=copied)) for item, tensor in tensors]))
        for path, key, (objects, tensors) in buckets
    ]


class PlannedSave:
    """This rank's part of a checkpoint that was planned: written by `write`, or by a thread after `start`.

    Args:
        request: what Megatron planned.
        directory: of the checkpoint.
    """

    def __init__(self, request: AsyncRequest, directory: Path) -> None:
        self.directory = directory
        self._request = request
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def write(self) -> None:
        """Write and fsync this rank's file before returning; an error is kept for `finish`."""
        self._write(copied=False)

    def start(self) -> None:
        """Copy what is to be written to host memory, then write it in a thread.

        The thread is not a daemon: a rank that ends in order ends its file first.
        """
        if self._request.async_fn is None:
            return
        rank, buckets, results = self._request.async_fn_args
        arguments = (rank, _on_host(buckets, copied=True), results)
        self._request = self._request._replace(async_fn_args=arguments, preload_fn=None)  # pyright: ignore[reportArgumentType]
        self._thread = threading.Thread(target=self._write, args=(False,), name="checkpoint")
        self._thread.start()

    def _write(self, copied: bool) -> None:
        if self._request.async_fn is None:
            return
        rank, buckets, results = self._request.async_fn_args
        try:
            self._request.async_fn(rank, _on_host(buckets, copied), results)
        except Exception as error:  # raised on every rank by `finish`
            self._error = error

    def finish(self, wait: bool) -> bool:
        """Make the checkpoint complete when every rank has written its file. Collective.

        Args:
            wait: for all ranks; otherwise look only.

        Returns:
            False: some rank still writes, ask again.

        Raises:
            StorageError: on every rank, when one has no room.
            CheckpointError: on every rank, when one could not write.
        """
        if wait and self._thread is not None:
            self._thread.join()
        is_done = self._thread is None or not self._thread.is_alive()
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (is_done, self._failure() if is_done else None))
        if not all(done for done, _ in answers):
            return False
        _raise_first([failure for _, failure in answers], self.directory)
        with told_apart(self.directory, "can not be completed"):
            for finalize in self._request.finalize_fns:
                finalize()
        return True

    def _failure(self) -> tuple[bool, str] | None:
        """(about storage?, what happened) on this rank."""
        if self._error is None:
            return None
        storage = StorageError.of(self._error)
        return (False, repr(self._error)) if storage is None else (True, str(storage))


def _raise_first(failures: Sequence[tuple[bool, str] | None], directory: Path) -> None:
    for rank, failure in enumerate(failures):
        if failure is None:
            continue
        is_storage, what = failure
        if is_storage:
            raise StorageError(f"rank {rank}: {what}")
        raise CheckpointError(f"{directory}: rank {rank} could not write its part: {what}")
