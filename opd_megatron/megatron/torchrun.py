"""torchrun, unchanged but for its store, which listens on one address only: loopback, or that of the first node.

    python -m opd_megatron.megatron.torchrun [--opd-fork] [--opd-nodes NODES,INDEX,ADDRESS,PORT]
        --nproc-per-node N (-m MODULE | SCRIPT) ARGS

`torchrun --standalone` opens two stores on every network interface, without authentication. torch takes no address
for a store, but takes a listening socket, and torchrun takes rendezvous handlers by name; this registers one whose
store is given such a socket, and which the ranks share instead of opening their own. On several nodes the first one
offers the store and the places are known beforehand, so nothing is negotiated. Left out: restarts, since a run that
lost a rank goes on from its last commit.

`--opd-fork`, for ranks on a CPU: torch and Megatron-Core are imported once, here, and the ranks are forked from this
process, which is torchrun's own way of starting functions. Most of a tiny learner's start is imports. CUDA does not
survive a fork, so on a GPU each rank is a new Python, as under any torchrun.

    https://docs.pytorch.org/docs/stable/elastic/rendezvous.html#registry
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.distributed.run import main as torchrun

from opd_megatron.importing import without_collections

BACKEND = "opd_one_address"
# The ranks end with this process, whose id they compare with that of their parent (learner.AGENT_PID).
_AGENT_PID = "OPD_TORCHRUN_PID"
_LOOPBACK = "127.0.0.1"
_NODES = "--opd-nodes"
FORK = "--opd-fork"
# What forked ranks find imported: all of the learner but its entry.
_LEARNER = (
    "opd_megatron.megatron.cpu_shim",
    "opd_megatron.megatron.state",
    "opd_megatron.megatron.commands",
)


@dataclass(frozen=True)
class Nodes:
    """This torchrun's place among those of the world; port 0: one of the kernel's choice (one node only)."""

    count: int = 1
    index: int = 0
    address: str = _LOOPBACK
    port: int = 0


class OneAddressRendezvous(RendezvousHandler):
    """Agents that know each other's places meet at the store of the first."""

    def __init__(self, parameters: RendezvousParameters, nodes: Nodes) -> None:
        self._nodes = nodes
        self._run_id = parameters.run_id
        if nodes.index == 0:
            listener = socket.create_server((nodes.address, nodes.port))
            self._port = listener.getsockname()[1]
            self._store: Store = TCPStore(
                nodes.address,
                self._port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        else:
            self._port = nodes.port
            # Waits for the first node, 300 s by default.
            self._store = TCPStore(nodes.address, nodes.port, is_master=False)

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(
            PrefixStore(self._run_id, self._store),
            rank=self._nodes.index,
            world_size=self._nodes.count,
            bootstrap_store_info=RendezvousStoreInfo(self._nodes.address, self._port),
        )

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _take_nodes(argv: list[str]) -> tuple[Nodes, list[str]]:
    """Our own option, and the rest for torchrun."""
    if _NODES not in argv:
        return Nodes(), argv
    at = argv.index(_NODES)
    count, index, address, port = argv[at + 1].split(",")
    return Nodes(int(count), int(index), address, int(port)), argv[:at] + argv[at + 2 :]


def _import_learner() -> None:
    # Megatron-Core warns of everything that a CPU has not.
    with without_collections(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LEARNER:
            importlib.import_module(name)


def _be_a_rank(entry: str, is_module: bool, argv: list[str]) -> None:
    """In the forked process: what a new Python would do with this command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [entry, *argv]
    if is_module:
        runpy.run_module(entry, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(entry).resolve().parent)
        runpy.run_path(entry, run_name="__main__")


def _fork(argv: list[str]) -> None:
    """What torchrun's main does, with a function in place of a command."""
    arguments = parse_args(argv)
    config, _, _ = config_from_args(arguments)
    config.start_method = "fork"
    _import_learner()
    entry = (arguments.training_script, arguments.module, arguments.training_script_args)
    elastic_launch(config, _be_a_rank)(*entry)


def main(argv: list[str]) -> None:
    """Run torchrun with this rendezvous."""
    nodes, argv = _take_nodes(argv)
    forks = FORK in argv
    os.environ[_AGENT_PID] = str(os.getpid())
    rendezvous_handler_registry.register(BACKEND, lambda p: OneAddressRendezvous(p, nodes))
    # The same for all nodes of a world.
    name = str(os.getpid()) if nodes.count == 1 else f"{nodes.address}:{nodes.port}"
    own = ["--rdzv-backend", BACKEND, "--rdzv-id", name, "--nnodes", str(nodes.count)]
    argv = [*own, "--max-restarts", "0", *(part for part in argv if part != FORK)]
    if forks:
        record(_fork)(argv)
    else:
        torchrun(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
