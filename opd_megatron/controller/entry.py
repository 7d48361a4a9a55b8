"""How a controller process begins and ends: its arguments, the heartbeat, an error's line and exit code."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.controller.heartbeat import beating
from opd_megatron.errors import EXIT_DONE, OpdError, StorageError
from opd_megatron.rundir import RunDir

Work = Callable[[Recipe, RunDir, int], Awaitable[None]]


def run_attempt(program: str, work: Work, argv: Sequence[str] | None = None) -> int:
    """Do `work(recipe, run, attempt)` for the run and the attempt on the command line.

    Args:
        program: name of the module, for the usage line.
        work: what this process is for; it may take the heartbeat for granted.
        argv: arguments; None means those of the process.

    Returns:
        The exit code. An expected error is one line on stdout.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args(argv)
    run = RunDir(arguments.run_dir)

    async def with_heartbeat() -> None:
        async with beating(run.attempt(arguments.attempt).heartbeat):
            await work(read_run_yaml(run.run_yaml), run, arguments.attempt)

    try:
        asyncio.run(with_heartbeat())
    except OpdError as error:
        return _report(error)
    except OSError as error:
        storage = StorageError.of(error)
        if storage is None:
            raise
        return _report(storage)
    return EXIT_DONE


def _report(error: OpdError) -> int:
    print(f"opd: {error}", flush=True)
    return error.exit_code
