"""Bring servers to an offered version, over any route, and prove that they hold it.

    route.begin, route.send, route.end
    verify every server by probes               verify.py

A `ServerError` before the verification is answered once: the route is cleaned up and, if every
server still answers, the whole update starts again from the first tensor. There is no going on in
the middle: which tensors a server took is not known. A second failure, or a server that does not
answer, is raised, and no server may be used: their labels say so. The pool then takes out whoever
is gone and asks for the update of the others. Wrong numbers are raised at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.errors import ServerError
from opd_megatron.weight_sync.route import Clients, Offer, WeightRoute, on_every_server
from opd_megatron.weight_sync.verify import expected_logprobs, verify_weights


@dataclass(frozen=True)
class SyncReport:
    """Every server holds `version`; the k-th is off by `deltas[k]` nats at most.

    Attributes:
        first_failure: why it took a second try, or None.
    """

    version: int
    deltas: tuple[float, ...]
    first_failure: str | None

    @property
    def max_delta(self) -> float:
        return max(self.deltas, default=0.0)


async def update_servers(
    route: WeightRoute,
    clients: Clients,
    offer: Offer,
    *,
    tolerance_nats: float,
    keep_requests: bool = False,
) -> SyncReport:
    """Update servers and verify them; all of them succeed or an error names those that did not.

    Args:
        offer: of this route.
        tolerance_nats: largest allowed |server - learner| of one probe token.
        keep_requests: those in flight go on with the new weights instead of ending with an error.

    Raises:
        NumericsError: a server answers with other weights than the learner's.
        ServerError: a server refused, ended, hangs or reports another version.
        ContractError: the probes are malformed, or a server's answer is.
    """
    expected_logprobs(offer)
    first_failure = None
    try:
        await _transfer(route, clients, offer.version, keep_requests)
    except ServerError as error:
        if not await route.abandon(clients):
            raise ServerError(f"{error}; not tried again: a server does not answer") from error
        first_failure = str(error)
        try:
            await _transfer(route, clients, offer.version, keep_requests)
        except ServerError as again:
            await route.abandon(clients)
            raise ServerError(f"{again}; tried twice, before: {first_failure}") from again
    deltas = await on_every_server(
        clients, lambda client: verify_weights(client, offer, tolerance_nats=tolerance_nats)
    )
    return SyncReport(offer.version, tuple(deltas), first_failure)


async def _transfer(
    route: WeightRoute, clients: Clients, version: int, keep_requests: bool
) -> None:
    await route.begin(clients, keep_requests=keep_requests)
    await route.send(clients, version)
    await route.end(clients, version)
