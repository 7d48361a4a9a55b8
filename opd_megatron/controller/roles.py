"""The controller's view of the other processes: clients by role, and the learner's mailbox."""

from __future__ import annotations

import asyncio
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


@dataclass(frozen=True)
class Roles:
    """Who the controller talks to. `teachers` are those with servers; the others are inside the learner."""

    rollout: tuple[SglangClient, ...]
    teachers: dict[str, tuple[SglangClient, ...]]
    learner: LearnerLink

    def rollout_client(self, position: int) -> SglangClient:
        """Groups go round robin by prompt position, so that a retry meets the same prefix cache."""
        return self.rollout[position % len(self.rollout)]

    def teacher_client(self, teacher: str, position: int) -> SglangClient:
        clients = self.teachers[teacher]
        return clients[position % len(clients)]


def open_roles(
    recipe: Recipe, attempt: AttemptDir, vocab_size: int, stack: AsyncExitStack
) -> Roles:
    """Make a client for every server named in the endpoint file; `stack` closes them."""
    keys = read_keys(attempt.keys)
    endpoints = read_json(attempt.endpoints)

    def clients(role: str, config: ServerConfig) -> tuple[SglangClient, ...]:
        made = []
        for endpoint in endpoints[role]:
            client = SglangClient(
                endpoint["name"],
                endpoint["url"],
                keys,
                vocab_size=vocab_size,
                timeout_s=config.request_timeout_s,
                max_retries=config.max_retries,
            )
            stack.push_async_callback(client.close)
            made.append(client)
        return tuple(made)

    return Roles(
        rollout=clients("rollout", recipe.rollout.server),
        teachers={
            name: clients(f"teacher-{name}", teacher.server)
            for name, teacher in recipe.served_teachers.items()
        },
        learner=LearnerLink(attempt.mailbox, recipe.learner.step_timeout_s),
    )


async def wait_for_servers(recipe: Recipe, roles: Roles, console: RunConsole) -> None:
    """Wait for every server at once; every 30 s each missing one is named.

    Raises:
        ServerError: one was not ready in time.
    """

    async def wait(client: SglangClient, config: ServerConfig) -> None:
        clock = WaitClock("its model to load", client.name, config.start_timeout_s)
        await client.wait_ready(config.start_timeout_s, lambda _s, _seen: _notice(clock, console))
        console.role(client.name, f"ready after {clock.waited_s:.0f} s")

    await asyncio.gather(
        *(wait(client, recipe.rollout.server) for client in roles.rollout),
        *(
            wait(client, recipe.teachers[name].server)
            for name, clients in roles.teachers.items()
            for client in clients
        ),
    )


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
