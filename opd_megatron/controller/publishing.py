"""New weights from the learner to every rollout server, through a directory, with proof."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.schema import Recipe
from opd_megatron.controller.roles import Roles
from opd_megatron.errors import ServerError
from opd_megatron.rundir import RunDir
from opd_megatron.serving.client import SglangClient
from opd_megatron.weight_sync.disk import SyncReport, push_weights


@dataclass(frozen=True)
class Published:
    """One version on disk, and the learner's own log-probs of the probes under it."""

    directory: Path
    version: int
    probe_tokens: Sequence[Sequence[int]]
    probe_logprobs: Sequence[Sequence[float]]


class Publisher:
    """Publishes versions and removes old ones.

    Attributes:
        probes: token sequences that every update is verified with.
    """

    def __init__(self, recipe: Recipe, run: RunDir, roles: Roles) -> None:
        self.probes: list[tuple[int, ...]] = []
        self._settings = recipe.weight_sync
        self._folder = run.weights
        self._roles = roles
        self._newest: Published | None = None
        roles.rollout.bring_up = self._bring_up

    async def publish(self, version: int) -> Published:
        """Let the learner write its weights as `weights/v<version>`."""
        self._folder.mkdir(exist_ok=True)
        directory = self._folder / f"v{version:06d}"
        probes = [list(probe) for probe in self.probes]
        answer = await self._roles.learner.ask(
            "publish", directory=str(directory), version=version, probe_tokens=probes
        )
        self._newest = Published(directory, version, probes, answer["probe_logprobs"])
        return self._newest

    async def push(self, published: Published) -> float:
        """Bring every rollout server to a published version.

        Returns:
            the largest |server - learner| over the probes, in nats; 0 where there is no server.

        Raises:
            NumericsError, ServerError: a server does not hold the version.
        """
        if not self._roles.rollout:
            self._remove_old(published.version)
            return 0.0
        report = await self._roles.rollout.update(
            published.version, lambda clients: self._push_to(clients, published)
        )
        self._remove_old(published.version)
        return report.max_delta

    async def _push_to(self, clients: Sequence[SglangClient], published: Published) -> SyncReport:
        return await push_weights(
            clients,
            published.directory,
            published.version,
            published.probe_tokens,
            published.probe_logprobs,
            tolerance_nats=self._settings.verify_tolerance_nats,
        )

    async def _bring_up(self, client: SglangClient) -> int:
        """Give a server that was away the newest published weights."""
        if self._newest is None:
            raise ServerError(f"{client.name}: came back before any weights were published")
        # What it was asked for before it went away is of no use to anybody.
        await client.abort_all()
        await self._push_to([client], self._newest)
        return self._newest.version

    def _remove_old(self, newest: int) -> None:
        for path in self._folder.iterdir():
            number = path.name.removeprefix("v")
            if number.isdigit() and int(number) <= newest - self._settings.keep_versions:
                shutil.rmtree(path)
