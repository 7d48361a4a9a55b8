"""The broadcast route: rank 0 of the learner sends buckets of tensors to every server's ranks.

    offer   learner: the buckets (names, shapes) and its probe log-probs; checked by manifest.py
    begin   learner opens a meeting point; it and all servers join one group (kept between updates);
            servers are held and open a session
    send    bucket by bucket: every server is asked to `receive`, rank 0 broadcasts
    end     servers close their sessions, get the label, generate again
    abandon learner closes its end of the group; servers leave it and drop the session

Group ranks: 0 is the learner, then each server's tensor-parallel ranks. NCCL on GPUs, gloo on CPU.

Who waits for whom: a broadcast returns only when all members are in it. A server that refuses, dies
or hangs would hold up the learner and the other servers, so both ends have a deadline (`timeout_s`,
the learner's first), and as soon as one request fails the learner is told through a file to break
the group, which ends the wait of every other server.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opd_megatron.errors import OpdError, ServerError
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.weight_admin import GroupAddress, is_consequence
from opd_megatron.weight_sync.disk import ANSWER_S, all_answer
from opd_megatron.weight_sync.manifest import Manifest, check_manifest
from opd_megatron.weight_sync.route import (
    Clients,
    Learner,
    Offer,
    combined,
    hold,
    let_go,
    on_every_server,
)

# A server must be given a little longer than the learner, so that it is the one that hangs.
_GRACE_S = 2.0


class BroadcastRoute:
    """Weights through a process group.

    Args:
        tensor_parallel: ranks of each server.
        model_path: what the servers were started with.
        folder: where the file that breaks a group is made; the learner sees it.
        backend: "nccl" or "gloo".
        bucket_bytes: size of a bucket; a larger tensor travels alone.
        timeout_s: budget of joining, and of sending a version.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        tensor_parallel: int,
        model_path: Path,
        folder: Path,
        backend: str,
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        self._learner = learner
        self._tensor_parallel = tensor_parallel
        self._model_path = model_path
        self._folder = folder
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._manifest: Manifest | None = None
        self._optimizer_step = 0
        self._group: GroupAddress | None = None
        self._members: Clients = ()
        self._held: int | None = None

    async def offer(self, version: int, probe_tokens: Sequence[Sequence[int]]) -> Offer:
        probes = [list(probe) for probe in probe_tokens]
        answer = await self._learner.ask(
            "offer", bucket_bytes=self._bucket_bytes, probe_tokens=probes
        )
        manifest = Manifest.of(answer)
        if manifest != self._manifest:
            await asyncio.to_thread(check_manifest, manifest, self._model_path)
            self._manifest = manifest
        self._optimizer_step = answer["optimizer_step"]
        return Offer(version, probes, answer["probe_logprobs"])

    async def begin(self, clients: Clients, *, keep_requests: bool = False) -> None:
        if self._group is not None and not await self._are_in_the_group(clients):
            await self._leave()
        await on_every_server(
            clients, lambda client: hold(client, self._timeout_s, keep_requests=keep_requests)
        )
        if self._group is None:
            await self._join(clients)
        await on_every_server(clients, lambda c: c.weights.open_session(self._timeout_s))

    async def send(self, clients: Clients, version: int) -> None:
        group, manifest = self._group, self._manifest
        assert group is not None and manifest is not None, "begin and offer come first"
        limit_s = self._timeout_s + _GRACE_S

        async def receive(client: SglangClient, _: int) -> None:
            for bucket in manifest.buckets:
                await client.weights.receive(bucket, manifest.dtype, group.name, limit_s)

        await self._together(
            f"weights of version {version}",
            "send",
            clients,
            receive,
            bucket_bytes=self._bucket_bytes,
            optimizer_step=self._optimizer_step,
        )

    async def end(self, clients: Clients, version: int) -> None:
        async def finish(client: SglangClient) -> None:
            await client.weights.close_session(self._timeout_s)
            await let_go(client, version, self._timeout_s)

        await on_every_server(clients, finish)
        # Servers are started with the label 0, which therefore proves no membership.
        self._held = version or None

    async def abandon(self, clients: Clients) -> bool:
        silent = await self._leave()
        limit_s = min(ANSWER_S, self._timeout_s)
        others = [client for client in clients if client.name not in silent]
        try:
            await on_every_server(others, lambda c: c.weights.drop_session(limit_s))
        except OpdError:
            return False
        return not silent and await all_answer(clients, self._timeout_s)

    async def _are_in_the_group(self, clients: Clients) -> bool:
        """A server that was started anew carries the label of its start, and is in no group."""
        if [c.name for c in self._members] != [c.name for c in clients]:
            return False
        answers = await on_every_server(clients, lambda client: client.model_info())
        return all(answer.weight_version == self._held for answer in answers)

    async def _join(self, clients: Clients) -> None:
        server = urlsplit(clients[0].url)
        opened = await self._learner.ask("open_group", server=[server.hostname, server.port])
        size = 1 + self._tensor_parallel * len(clients)
        name = f"opd-{uuid.uuid4().hex[:12]}"
        # Known from here on, so that `abandon` makes the servers leave it.
        self._group = group = GroupAddress(
            name, opened["host"], opened["port"], size, self._backend
        )
        self._members = tuple(clients)

        async def join(client: SglangClient, number: int) -> None:
            first = 1 + number * self._tensor_parallel
            await client.weights.join_group(group, first, self._timeout_s + _GRACE_S)

        await self._together(
            "joining the broadcast group", "join_group", clients, join, name=name, world_size=size
        )

    async def _leave(self) -> set[str]:
        """Break the group from the learner's end, then have its servers forget it; who did not answer."""
        await self._learner.ask("close_group")
        group, self._group, self._held = self._group, None, None
        if group is None:
            return set()
        limit_s = min(ANSWER_S, self._timeout_s)
        outcomes = await asyncio.gather(
            *(client.weights.leave_group(group.name, limit_s) for client in self._members),
            return_exceptions=True,
        )
        # Who is gone by now is in no group; who hangs forgets it when the update is over for it.
        silent: set[str] = set()
        for client, outcome in zip(self._members, outcomes, strict=True):
            if isinstance(outcome, OpdError):
                silent.add(client.name)
            elif outcome is not None:
                raise outcome
        return silent

    async def _together(
        self,
        what: str,
        kind: str,
        clients: Clients,
        work: Callable[[SglangClient, int], Awaitable[None]],
        **arguments: Any,
    ) -> None:
        """A command of the learner that waits for the servers, and what the servers do meanwhile.

        Raises:
            ServerError: naming the servers at fault.
        """
        breaker = self._folder / f"break-{uuid.uuid4().hex}"
        asking = asyncio.create_task(
            self._learner.ask(kind, breaker=str(breaker), timeout_s=self._timeout_s, **arguments)
        )
        working = [asyncio.ensure_future(work(c, n)) for n, c in enumerate(clients)]
        waiting: set[asyncio.Future[Any]] = {asking, *working}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if any(task.exception() is not None for task in done):
                    breaker.touch()
        finally:
            for task in waiting:
                task.cancel()
            breaker.unlink(missing_ok=True)
        _raise_failures(what, asking.result()["failed"], [task.exception() for task in working])


def _raise_failures(
    what: str, learner: str | None, servers: Sequence[BaseException | None]
) -> None:
    """Raise what went wrong, if anything did: the causes, not what the others saw of them."""
    failures = []
    for error in servers:
        if error is not None and not isinstance(error, OpdError):
            raise error
        if error is not None:
            failures.append(error)
    causes = [e for e in failures if not (isinstance(e, ServerError) and is_consequence(e))]
    if causes:
        raise combined(causes, f"{what}: {len(causes)} of {len(servers)} servers failed")
    if failures or learner is not None:
        seen = "; ".join([*([f"learner: {learner}"] if learner else []), *map(str, failures)])
        raise ServerError(f"{what}: the broadcast failed: {seen}")
