"""New weights from the learner to every rollout server, by the recipe's route, with proof."""

from __future__ import annotations

from pathlib import Path

from opd_megatron.config.schema import Recipe
from opd_megatron.controller.roles import Roles
from opd_megatron.errors import ServerError
from opd_megatron.observe.console import RunConsole
from opd_megatron.rundir import RunDir
from opd_megatron.serving.client import SglangClient
from opd_megatron.weight_sync.broadcast import BroadcastRoute
from opd_megatron.weight_sync.disk import DiskRoute
from opd_megatron.weight_sync.route import Clients, Offer, WeightRoute
from opd_megatron.weight_sync.update import SyncReport, update_servers

_MIB = 1 << 20
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def make_route(recipe: Recipe, run: RunDir, roles: Roles) -> WeightRoute:
    """The route that `weight_sync.route` names."""
    settings = recipe.weight_sync
    if settings.route == "disk":
        return DiskRoute(
            roles.learner, run.weights, keep=settings.keep_versions, timeout_s=settings.timeout_s
        )
    return BroadcastRoute(
        roles.learner,
        tensor_parallel=recipe.rollout.server.tensor_parallel,
        model_path=Path(recipe.student.path),
        folder=roles.learner.folder,
        backend=_BACKENDS[recipe.device],
        bucket_bytes=settings.bucket_mib * _MIB,
        timeout_s=settings.timeout_s,
    )


class Publisher:
    """Brings versions to the rollout servers.

    Attributes:
        probes: token sequences that every update is verified with.
    """

    def __init__(self, recipe: Recipe, run: RunDir, roles: Roles, console: RunConsole) -> None:
        self.probes: list[tuple[int, ...]] = []
        # Strictly on-policy nothing is under way that anybody still wants.
        self._keep_requests = recipe.overlap.mode != "sync"
        self._tolerance_nats = recipe.weight_sync.verify_tolerance_nats
        self._route = make_route(recipe, run, roles)
        self._pool = roles.rollout
        self._console = console
        self._newest: Offer | None = None
        roles.rollout.bring_up = self._bring_up

    async def publish(self, version: int) -> Offer:
        """Let the learner make its weights ready, as `version`."""
        self._newest = await self._route.offer(version, self.probes)
        return self._newest

    async def push(self, offer: Offer) -> float:
        """Bring every rollout server to an offered version.

        Returns:
            the largest |server - learner| over the probes, in nats; 0 where there is no server.

        Raises:
            NumericsError, ServerError: a server does not hold the version.
        """
        if not self._pool:
            await self._route.end((), offer.version)
            return 0.0
        report = await self._pool.update(
            offer.version,
            lambda clients: self._update(clients, offer, keep_requests=self._keep_requests),
        )
        return report.max_delta

    async def _update(
        self, clients: Clients, offer: Offer, *, keep_requests: bool = False
    ) -> SyncReport:
        report = await update_servers(
            self._route,
            clients,
            offer,
            tolerance_nats=self._tolerance_nats,
            keep_requests=keep_requests,
        )
        if report.first_failure is not None:
            self._console.say(f"weights v{offer.version} were sent twice: {report.first_failure}")
        return report

    async def _bring_up(self, client: SglangClient) -> int:
        """Give a server that was away the newest published weights."""
        if self._newest is None:
            raise ServerError(f"{client.name}: came back before any weights were published")
        offer = self._newest
        await self._update([client], offer)
        return offer.version
