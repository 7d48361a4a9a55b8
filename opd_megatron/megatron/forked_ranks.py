"""torchrun whose ranks are forked, for a CPU: torch and Megatron-Core are imported once for all of them.

Most of a tiny learner's start is imports. The ranks are started the way torchrun starts functions. CUDA does not
survive a fork, so on a GPU each rank is a new Python, as under any torchrun.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import traceback
import warnings
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from opd_megatron.importing import without_collections

# What forked ranks find imported: all of the learner but its entry.
_LEARNER = (
    "opd_megatron.megatron.cpu_shim",
    "opd_megatron.megatron.state",
    "opd_megatron.megatron.commands",
)


def _import_learner() -> None:
    # Megatron-Core warns of everything that a CPU has not.
    with without_collections(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LEARNER:
            importlib.import_module(name)


class _Ends:
    """Says at once how each rank ended; torchrun looks ten times a second and names one of those that did."""

    def __init__(self) -> None:
        self._told: set[int] = set()

    def __call__(self, *_: object) -> None:
        for child in psutil.Process().children():
            end = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is None or end.si_status == 0 or child.pid in self._told:
                continue
            self._told.add(child.pid)
            was_killed = end.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
            how = signal.Signals(end.si_status).name if was_killed else f"code {end.si_status}"
            print(f"torchrun: {child.name()} ended with {how}", file=sys.stderr, flush=True)


def _be_a_rank(entry: str, is_module: bool, argv: list[str]) -> None:
    """In the forked process: what a new Python would do with this command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [entry, *argv]
    if is_module:
        runpy.run_module(entry, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(entry).resolve().parent)
        runpy.run_path(entry, run_name="__main__")


def _launch(argv: list[str]) -> None:
    """What torchrun's main does, with a function in place of a command."""
    arguments = parse_args(argv)
    config, _, _ = config_from_args(arguments)
    config.start_method = "fork"
    _import_learner()
    signal.signal(signal.SIGCHLD, _Ends())
    entry = (arguments.training_script, arguments.module, arguments.training_script_args)
    elastic_launch(config, _be_a_rank)(*entry)


def run_forked(argv: list[str]) -> None:
    """Run torchrun on its command line and end this process, with code 1 when a rank failed."""
    code = 1
    try:
        record(_launch)(argv)
        code = 0
    except Exception:
        traceback.print_exc()
    # Tearing down all that was imported takes a second, in which nobody could tell that the ranks are dead.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
