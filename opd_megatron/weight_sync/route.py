"""How weights travel: the protocol that every route keeps, and its failures.

    offer    the learner makes a version ready and says what its log-probs of the probes are
    begin    the servers generate nothing any more, and their labels say "stale"; requests in flight end with
             an error or, with `keep_requests`, go on afterwards with the new weights
    send     the weights travel; nobody's label changes before all of them are there
    end      label `version`, no cached prefix of older weights, generation goes on
    abandon  after a failure: whatever is left over of the update is taken away

`update.py` drives a route and verifies the result; which servers take part is the pool's business
(`serving/pool.py`), which gives them no request meanwhile. Each of begin, send and end is over within
`timeout_s` or raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from opd_megatron.errors import ContractError, NumericsError, OpdError, ServerError
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.weight_admin import STALE_LABEL

Clients = Sequence[SglangClient]
Result = TypeVar("Result")

# What several failures together are raised as, gravest first: a retry does not help against the first.
_KINDS = (NumericsError, ContractError, ServerError, OpdError)


@dataclass(frozen=True)
class Offer:
    """A version that the learner holds, and how it is recognised.

    Attributes:
        version: label of the weights.
        probe_tokens: sequences of at least two ids.
        probe_logprobs: for each, the learner's log-prob at temperature 1 of ids 1.. given those
            before them.
    """

    version: int
    probe_tokens: Sequence[Sequence[int]]
    probe_logprobs: Sequence[Sequence[float]]


class Learner(Protocol):
    """The learner's mailbox: one command, one answer."""

    async def ask(self, kind: str, **arguments: Any) -> dict[str, Any]: ...


class WeightRoute(Protocol):
    """One way from the learner to servers. The module docstring says what each part does.

    Raises:
        ServerError: a server refused, ended or gave no answer in time; it is named.
    """

    async def offer(self, version: int, probe_tokens: Sequence[Sequence[int]]) -> Offer: ...

    async def begin(self, clients: Clients, *, keep_requests: bool = False) -> None: ...

    async def send(self, clients: Clients, version: int) -> None: ...

    async def end(self, clients: Clients, version: int) -> None: ...

    async def abandon(self, clients: Clients) -> bool:
        """Clean up; True when every server answered, so that trying again makes sense."""
        ...


async def on_every_server(
    clients: Clients, work: Callable[[SglangClient], Awaitable[Result]]
) -> list[Result]:
    """Do the same on all servers at once.

    Raises:
        OpdError: the gravest kind of what went wrong, naming every server that failed.
    """
    outcomes = await asyncio.gather(*(work(client) for client in clients), return_exceptions=True)
    results: list[Result] = []
    failures: list[OpdError] = []
    for outcome in outcomes:
        if isinstance(outcome, OpdError):
            failures.append(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            results.append(outcome)
    if failures:
        raise combined(failures, f"{len(results)} of {len(clients)} servers succeeded")
    return results


def combined(failures: Sequence[OpdError], summary: str) -> OpdError:
    """One error of the gravest kind, whose message holds all, gravest first."""
    kind = next(kind for kind in _KINDS if any(isinstance(error, kind) for error in failures))
    ordered = sorted(failures, key=lambda error: not isinstance(error, kind))
    return kind(f"{summary}: {'; '.join(str(error) for error in ordered)}")


async def hold(client: SglangClient, timeout_s: float, *, keep_requests: bool = False) -> None:
    """Stop a server's generation and take its version away, until `let_go`."""
    await client.weights.pause(timeout_s, keep_requests=keep_requests)
    await client.weights.set_label(STALE_LABEL, timeout_s)


async def let_go(client: SglangClient, version: int, timeout_s: float) -> None:
    """Give a server its new version, without what it cached under older ones, and let it generate."""
    await client.weights.flush(timeout_s)
    await client.weights.set_label(str(version), timeout_s)
    await client.weights.resume(timeout_s)
