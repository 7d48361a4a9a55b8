"""torchrun, unchanged but for its store, which listens on one address only: loopback, or that of the first node.

    python -m opd_megatron.megatron.torchrun [--opd-fork] [--opd-nodes NODES,INDEX,ADDRESS,PORT]
        --nproc-per-node N (-m MODULE | SCRIPT) ARGS

`torchrun --standalone` opens two stores on every network interface, without authentication. torch takes no address
for a store, but takes a listening socket, and torchrun takes rendezvous handlers by name; this registers one whose
store is given such a socket, and which the ranks share instead of opening their own. On several nodes the first one
offers the store and the places are known beforehand, so nothing is negotiated. Left out: restarts, since a run that
lost a rank goes on from its last commit.

With `--opd-fork` the ranks are forked (forked_ranks.py).

    https://docs.pytorch.org/docs/stable/elastic/rendezvous.html#registry
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import main as torchrun

from opd_megatron.megatron.forked_ranks import run_forked

BACKEND = "opd_one_address"
# The ranks end with this process, whose id they compare with that of their parent (learner.AGENT_PID).
_AGENT_PID = "OPD_TORCHRUN_PID"
_LOOPBACK = "127.0.0.1"
_NODES = "--opd-nodes"
FORK = "--opd-fork"


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
        run_forked(argv)
    else:
        torchrun(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
