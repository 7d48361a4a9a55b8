"""The disk route: the learner writes a Hugging Face directory, every server loads it.

A server loads the directory in one request, so there is no half of an update to meet; the directory
must be on storage that the servers reach.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from opd_megatron.errors import OpdError
from opd_megatron.serving.weight_admin import STALE_LABEL
from opd_megatron.weight_sync.route import Clients, Learner, Offer, hold, let_go, on_every_server

# A server that does not acknowledge a label in this time is taken for hanging.
ANSWER_S = 20.0


class DiskRoute:
    """Weights through `folder/v<version>`.

    Args:
        folder: of all versions; made when the first one is offered.
        keep: how many of the newest versions stay.
        timeout_s: budget of each request.
    """

    def __init__(
        self,
        learner: Learner,
        folder: Path,
        *,
        keep: int,
        timeout_s: float,
    ) -> None:
        self._learner = learner
        self._folder = folder
        self._keep = keep
        self._timeout_s = timeout_s

    def directory(self, version: int) -> Path:
        return self._folder / f"v{version:06d}"

    async def offer(self, version: int, probe_tokens: Sequence[Sequence[int]]) -> Offer:
        """Let the learner write its weights."""
        self._folder.mkdir(exist_ok=True)
        probes = [list(probe) for probe in probe_tokens]
        answer = await self._learner.ask(
            "publish",
            directory=str(self.directory(version)),
            version=version,
            probe_tokens=probes,
        )
        return Offer(version, probes, answer["probe_logprobs"])

    async def begin(self, clients: Clients, *, keep_requests: bool = False) -> None:
        await on_every_server(
            clients, lambda client: hold(client, self._timeout_s, keep_requests=keep_requests)
        )

    async def send(self, clients: Clients, version: int) -> None:
        directory = self.directory(version)
        await on_every_server(
            clients,
            lambda client: client.weights.load_directory(directory, version, self._timeout_s),
        )

    async def end(self, clients: Clients, version: int) -> None:
        await on_every_server(clients, lambda client: let_go(client, version, self._timeout_s))
        self._remove_old(version)

    async def abandon(self, clients: Clients) -> bool:
        return await all_answer(clients, self._timeout_s)

    def _remove_old(self, newest: int) -> None:
        for path in self._folder.iterdir():
            number = path.name.removeprefix("v")
            if number.isdigit() and int(number) <= newest - self._keep:
                shutil.rmtree(path)


async def all_answer(clients: Clients, timeout_s: float) -> bool:
    """Label every server stale once more; whether all of them acknowledged it."""
    limit_s = min(ANSWER_S, timeout_s)
    try:
        await on_every_server(clients, lambda c: c.weights.set_label(STALE_LABEL, limit_s))
    except OpdError:
        return False
    return True
