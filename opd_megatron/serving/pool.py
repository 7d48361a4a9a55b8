"""Several servers of one role as one: a request goes to one of them, and to another when that one fails.

    request      the least loaded server in service (`members.py`)
    failed       TimedOut, Unreachable, aborted: the server is out of service. An answer that breaks the contract, or
                 carries another version than the server was proven to hold: the same at the third in a row, at once
                 for the version. The request goes to another server; which servers live is learned from real requests.
    out          as soon as it answers again it is STALE, is brought up (`bring_up`: updated and verified) and then in
                 service. A process that died is started again by the supervisor; this is how its server comes back.
    nobody left  requests wait, `return_timeout_s` at most, for a server to come back

Whatever a caller gets was answered by a server in service, whole, and by the version that it was proven to hold.
`RequestRefused` and ids that may not be sent are the request's own fault: raised at once. Left out: starting and
ending processes (`launch`), and what an update is (`weight_sync`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from opd_megatron.errors import (
    ContractError,
    InvalidRequest,
    OpdError,
    RequestRefused,
    ServerError,
    TimedOut,
    Unreachable,
)
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.contract import Generation, ScoredResponse
from opd_megatron.serving.members import Counts, Member, State, choose
from opd_megatron.serving.requests import Sampling

Result = TypeVar("Result")
BringUp = Callable[[SglangClient], Awaitable[int]]

# Sends of one request, so that servers that come and go can not keep it for ever.
_MAX_SENDS = 8
_BROKEN_IN_A_ROW = 3
_RETURN_PAUSE_S = 0.5
_SIGN_OF_LIFE_S = 30.0


class ServerPool:
    """The servers of one role, for use within one event loop; `close` it before its clients.

    Args:
        role: what messages call it, e.g. "rollout".
        clients: one for each server.
        return_timeout_s: how long a server may be away, and how long requests wait for one.
        say: tells the user when a server leaves and returns.

    Attributes:
        bring_up: updates and verifies one server that came back, and returns the version that it holds then.
        counts: what happened so far.
    """

    def __init__(
        self,
        role: str,
        clients: Sequence[SglangClient],
        *,
        return_timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.name = role
        self.clients = tuple(clients)
        self.bring_up: BringUp = _no_bring_up
        self.counts = Counts()
        self._members = {client.name: Member(client) for client in clients}
        self._return_timeout_s = return_timeout_s
        self._say = say
        self._changed = asyncio.Event()
        self._updating = asyncio.Lock()
        self._returns: set[asyncio.Task[None]] = set()
        self._fatal: OpdError | None = None

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def states(self) -> dict[str, State]:
        return {member.name: member.state for member in self._members.values()}

    async def close(self) -> None:
        """Stop waiting for servers to return."""
        for task in self._returns:
            task.cancel()
        await asyncio.gather(*self._returns, return_exceptions=True)

    # ------------------------------------------------------------ requests

    async def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        rids: Sequence[str],
        topk: int = 0,
        stay_with: str = "",
    ) -> list[Generation]:
        """As `SglangClient.generate`, by any server in service.

        Args:
            stay_with: name of the server that has most of it in its cache; empty: whoever has least to do.

        Raises:
            RequestRefused, InvalidRequest: the request's fault.
            ContractError: no server gave an answer that can be used.
            ServerError: no server answered.
        """
        if not prompts:
            return []

        async def ask(member: Member, send: int) -> list[Generation]:
            names = [f"{rid}/{send}" for rid in rids] if send else list(rids)
            held = member.version
            more = (topk,) if topk else ()
            answers = await member.client.generate(prompts, sampling, names, *more)
            await self._update_is_over(member, answers)
            for answer in answers:
                _check_version(member, held, answer.version_first, answer.version_last)
            return answers

        return await self._somewhere(prompts[0], len(prompts), ask, stay_with)

    async def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], topk: int = 0
    ) -> list[ScoredResponse]:
        """As `SglangClient.score`, by any server in service; raises as `generate`."""
        return await self._score(sequences, lambda client: client.score(sequences, topk))

    async def score_listed(
        self,
        sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        listed: Sequence[tuple[int, ...]],
        stay_with: str = "",
    ) -> list[ScoredResponse]:
        """As `SglangClient.score_listed`, by any server in service; `stay_with` and errors as of `generate`."""
        return await self._score(
            sequences, lambda client: client.score_listed(sequences, listed), stay_with
        )

    async def _score(
        self,
        sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        request: Callable[[SglangClient], Awaitable[list[ScoredResponse]]],
        stay_with: str = "",
    ) -> list[ScoredResponse]:
        if not sequences:
            return []

        async def ask(member: Member, send: int) -> list[ScoredResponse]:
            held = member.version
            answers = await request(member.client)
            for answer in answers:
                if answer.weight_version is not None:
                    _check_version(member, held, answer.weight_version)
            return answers

        return await self._somewhere(sequences[0][0], len(sequences), ask, stay_with)

    async def _somewhere(
        self,
        prefix: Sequence[int],
        size: int,
        ask: Callable[[Member, int], Awaitable[Result]],
        stay_with: str = "",
    ) -> Result:
        """Ask servers in turn until one gives an answer that can be used."""
        failed: list[Member] = []
        while True:
            member = await self._in_service(prefix, failed, stay_with)
            member.load += size
            try:
                answer = await ask(member, len(failed))
            except (RequestRefused, InvalidRequest):
                raise
            except (ServerError, ContractError) as error:
                self._note(member, error)
                failed.append(member)
                everyone = {m.name for m in failed} == set(self._members)
                if len(failed) == _MAX_SENDS or (everyone and isinstance(error, ContractError)):
                    raise
            else:
                member.broken_in_a_row = 0
                return answer
            finally:
                member.load -= size

    async def _update_is_over(self, member: Member, answers: Sequence[Generation]) -> None:
        """Wait until it is proven that a server holds the weights that its answers claim to be of.

        Where weights change while requests are under way, an answer may end between the change and its proof.
        """
        if any(answer.version_last != member.version for answer in answers):
            async with self._updating:
                pass

    async def _in_service(
        self, prefix: Sequence[int], avoid: Sequence[Member], stay_with: str = ""
    ) -> Member:
        """A server for a request; waits for one to come back when there is none."""
        deadline = time.monotonic() + self._return_timeout_s
        members = list(self._members.values())
        while (member := choose(members, prefix, avoid, stay_with)) is None:
            if self._fatal is not None:
                raise self._fatal
            self._changed.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError as error:
                reasons = "; ".join(m.why_out or f"{m.name} is stale" for m in members)
                raise ServerError(
                    f"{self.name}: no server in service for {self._return_timeout_s:g} s: {reasons}"
                ) from error
        return member

    def _note(self, member: Member, error: ServerError | ContractError) -> None:
        """Count a failure, and decide whether the server stays in service."""
        self.counts.add(kind_of(error))
        if isinstance(error, ContractError) and not isinstance(error, _OtherVersion):
            member.broken_in_a_row += 1
            if member.broken_in_a_row < _BROKEN_IN_A_ROW:
                return
        self._take_out(member, str(error))

    # ------------------------------------------------------------ who is in service

    def admit(self, client: SglangClient, version: int) -> None:
        """A server was proven to hold a version: it may get requests."""
        member = self._members[client.name]
        member.state, member.version, member.broken_in_a_row = State.IN_SERVICE, version, 0
        self._changed.set()

    async def update(
        self, version: int, work: Callable[[Sequence[SglangClient]], Awaitable[Result]]
    ) -> Result:
        """Bring the servers in service to a version; one that fails is left out as long as another succeeds.

        Args:
            work: updates and verifies servers, all of them or it raises.

        Raises:
            OpdError: of `work`, when it is not about a server that has gone; ServerError: nobody is left.
        """
        while True:
            async with self._updating:
                members = [m for m in self._members.values() if m.state is not State.OUT]
                if members:
                    for member in members:
                        member.state = State.STALE
                    clients = [member.client for member in members]
                    try:
                        result = await work(clients)
                    except ServerError:
                        if not await self._take_out_dead(members):
                            raise
                    else:
                        # One that failed a request meanwhile comes back in its own time.
                        for member in members:
                            if member.state is State.STALE:
                                self.admit(member.client, version)
                        return result
            # Nobody may be left; a server that comes back is brought to an older version first.
            if all(member.state is State.OUT for member in self._members.values()):
                await self._in_service((), ())

    async def _take_out_dead(self, members: Sequence[Member]) -> bool:
        """Ask each for a sign of life; True when one gave none."""
        answers = await asyncio.gather(
            *(asyncio.wait_for(m.client.model_info(), _SIGN_OF_LIFE_S) for m in members),
            return_exceptions=True,
        )
        dead = [
            (member, answer)
            for member, answer in zip(members, answers, strict=True)
            if isinstance(answer, OpdError | TimeoutError)
        ]
        for member, error in dead:
            self.counts.add("update")
            self._take_out(member, str(error) or f"{member.name}: no sign of life")
        return bool(dead)

    def _take_out(self, member: Member, why: str) -> None:
        if member.state is State.OUT:
            return
        member.state, member.why_out = State.OUT, why
        self.counts.left += 1
        self._say(f"{member.name} is out of service: {why}")
        task = asyncio.create_task(self._wait_for_return(member), name=f"{member.name} to return")
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)

    async def _wait_for_return(self, member: Member) -> None:
        """From OUT to IN_SERVICE, or for ever OUT when it is away for too long."""
        began = time.monotonic()
        while time.monotonic() - began < self._return_timeout_s:
            try:
                left_s = self._return_timeout_s - (time.monotonic() - began)
                await member.client.wait_ready(left_s)
                async with self._updating:
                    member.state = State.STALE
                    version = await self.bring_up(member.client)
                    self.admit(member.client, version)
                self.counts.returned += 1
                away_s = time.monotonic() - began
                self._say(f"{member.name} is back after {away_s:.0f} s, with weights v{version}")
                return
            except (ServerError, ContractError) as error:
                member.state, member.why_out = State.OUT, str(error)
            except OpdError as error:
                # Wrong numbers: another try would not help, and it must not be used.
                member.state, member.why_out, self._fatal = State.OUT, str(error), error
                self._changed.set()
                return
            await asyncio.sleep(_RETURN_PAUSE_S)

    def metrics(self) -> dict[str, float]:
        """Figures since the start of the attempt, under the pool's role."""
        out = sum(member.state is State.OUT for member in self._members.values())
        return {
            "servers/out": float(out),
            "servers/left": float(self.counts.left),
            "servers/returned": float(self.counts.returned),
            "servers/failed_requests": float(sum(self.counts.failures.values())),
        }


class _OtherVersion(ContractError):
    """A server answered with other weights than it was proven to hold."""


def _check_version(member: Member, held_before: int | None, *seen: int) -> None:
    """An answer is of the version held when it was asked for, or of a newer one up to the present."""
    oldest, newest = held_before, member.version
    if oldest is None or newest is None or not all(oldest <= v <= newest for v in seen):
        raise _OtherVersion(
            f"{member.name}: answered with weights of version {sorted(set(seen))}, "
            f"but was proven to hold {member.version}"
        )


def kind_of(error: Any) -> str:
    """The kind of a failure, as it is counted."""
    if isinstance(error, _OtherVersion):
        return "version"
    if isinstance(error, ContractError):
        return "contract"
    if isinstance(error, TimedOut):
        return "no answer"
    return "unreachable" if isinstance(error, Unreachable) else "refused"


async def _no_bring_up(client: SglangClient) -> int:
    raise ServerError(f"{client.name}: nobody can bring it up yet")
