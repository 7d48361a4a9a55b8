"""The controller's view of the other processes: servers by role, and the learner's mailbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from opd_megatron.atomic import read_json
from opd_megatron.config.schema import Recipe, ServerConfig
from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.observe.console import RunConsole
from opd_megatron.observe.waiting import WaitClock
from opd_megatron.rundir import AttemptDir
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.keys import read_keys
from opd_megatron.serving.pool import ServerPool


@dataclass(frozen=True)
class Roles:
    """Who the controller talks to. `teachers` are those with servers; the others are inside the learner."""

    rollout: ServerPool
    teachers: dict[str, ServerPool]
    learner: LearnerLink

    def server_metrics(self) -> dict[str, float]:
        """servers/* over all roles, since the start of the attempt."""
        pools = [self.rollout, *self.teachers.values()]
        rows = [pool.metrics() for pool in pools if len(pool) > 0]
        return {name: sum(row[name] for row in rows) for name in (rows[0] if rows else {})}


def open_roles(
    recipe: Recipe,
    attempt: AttemptDir,
    vocab_size: int,
    stack: AsyncExitStack,
    say: Callable[[str], None],
) -> Roles:
    """Make a pool of clients for every role in the endpoint file; `stack` closes them."""
    keys = read_keys(attempt.keys)
    endpoints = read_json(attempt.endpoints)

    def pool(role: str, config: ServerConfig) -> ServerPool:
        clients = [
            SglangClient(
                endpoint["name"],
                endpoint["url"],
                keys,
                vocab_size=vocab_size,
                timeout_s=config.request_timeout_s,
                max_retries=config.max_retries,
            )
            for endpoint in endpoints[role]
        ]
        for client in clients:
            stack.push_async_callback(client.close)
        made = ServerPool(role, clients, return_timeout_s=config.start_timeout_s, say=say)
        stack.push_async_callback(made.close)
        return made

    return Roles(
        rollout=pool("rollout", recipe.rollout.server),
        teachers={
            name: pool(f"teacher-{name}", teacher.server)
            for name, teacher in recipe.served_teachers.items()
        },
        learner=LearnerLink(
            attempt.mailbox, recipe.learner.step_timeout_s, recipe.learner.hang_timeout_s
        ),
    )


async def wait_for_servers(recipe: Recipe, roles: Roles, console: RunConsole) -> None:
    """Wait for every server at once; every 30 s each missing one is named.

    Raises:
        ServerError: one was not ready in time.
    """

    async def wait(pool: ServerPool, client: SglangClient, config: ServerConfig) -> None:
        clock = WaitClock("its model to load", client.name, config.start_timeout_s)
        answer = await client.wait_ready(
            config.start_timeout_s, lambda _s, _seen: _notice(clock, console)
        )
        # What it loaded is what it serves; rollout servers are updated and verified after this too.
        pool.admit(client, answer.weight_version)
        console.role(client.name, f"ready after {clock.waited_s:.0f} s")

    pools = [(roles.rollout, recipe.rollout.server)]
    for name, pool in roles.teachers.items():
        pools.append((pool, recipe.teachers[name].server))
        pool.bring_up = served_version
    roles.rollout.bring_up = served_version
    await asyncio.gather(
        *(wait(pool, client, config) for pool, config in pools for client in pool.clients)
    )


async def served_version(client: SglangClient) -> int:
    """Bring up a server whose weights never change: what it loaded at its start is right."""
    return (await client.model_info()).weight_version


async def wait_for_learner(recipe: Recipe, roles: Roles, console: RunConsole) -> None:
    """Wait for every rank of the learner.

    Raises:
        RoleDied: not ready in time.
    """
    limit = recipe.learner.start_timeout_s
    clock = WaitClock("its ranks to meet", "learner", limit)
    facts = await roles.learner.wait_ready(limit, lambda _: _notice(clock, console))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    console.role("learner", f"ready after {clock.waited_s:.0f} s ({versions})")


def _notice(clock: WaitClock, console: RunConsole) -> None:
    notice = clock.due()
    if notice is not None:
        console.say(notice)
