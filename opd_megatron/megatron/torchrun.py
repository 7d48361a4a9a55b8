"""torchrun for one machine, unchanged but for its store, which listens on loopback only.

    python -m opd_megatron.megatron.torchrun --nproc-per-node N -m MODULE ARGS

`torchrun --standalone` opens two stores on every network interface, without authentication. torch takes no address
for a store, but takes a listening socket, and torchrun takes rendezvous handlers by name; this registers one whose
store is given such a socket, and which the ranks share instead of opening their own. Left out: more than one node
and restarts, since a run that lost a rank goes on from its last commit.

    https://docs.pytorch.org/docs/stable/elastic/rendezvous.html#registry
"""

from __future__ import annotations

import os
import socket
import sys

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import main as torchrun

BACKEND = "opd_loopback"
# The ranks end with this process, whose id they compare with that of their parent (learner.AGENT_PID).
_AGENT_PID = "OPD_TORCHRUN_PID"
_LOOPBACK = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """One agent that meets itself, at a port of the kernel's choice."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        listener = socket.create_server((_LOOPBACK, 0))
        self._port = listener.getsockname()[1]
        self._store: Store = TCPStore(
            _LOOPBACK,
            self._port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(
            PrefixStore(self._run_id, self._store),
            rank=0,
            world_size=1,
            bootstrap_store_info=RendezvousStoreInfo(_LOOPBACK, self._port),
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


def main(argv: list[str]) -> None:
    """Run torchrun's own main with this rendezvous; it ends the process."""
    os.environ[_AGENT_PID] = str(os.getpid())
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
    own = ["--rdzv-backend", BACKEND, "--rdzv-id", str(os.getpid()), "--nnodes", "1"]
    torchrun([*own, "--max-restarts", "0", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
