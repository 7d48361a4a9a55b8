"""What the weight update tests ask of servers: do they hold a version, are they out of use, what runs meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from weight_sync_scene import BUCKET_BYTES, LONG_S, PROBES, TOLERANCE_NATS, Scene, Server

from opd_megatron.config.schema import Recipe, StudentConfig, WeightSyncConfig
from opd_megatron.controller.publishing import Publisher
from opd_megatron.controller.roles import Roles
from opd_megatron.observe.console import RunConsole
from opd_megatron.rundir import RunDir
from opd_megatron.serving.client import NO_VERSION, SglangClient
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.weight_sync.broadcast import BroadcastRoute
from opd_megatron.weight_sync.route import hold, let_go


def generate(scene: Scene, server: Server) -> Any:
    sampling = Sampling(temperature=1.0, max_new_tokens=3)
    return scene.run(server.client.generate([(3, 4)], sampling, [f"g{time.monotonic()}"]))[0]


def check_held(scene: Scene, server: Server, checksums: dict[str, str]) -> None:
    assert scene.checksums(server) == checksums
    generation = generate(scene, server)
    assert (generation.version_first, generation.version_last) == (scene.version, scene.version)


def check_unusable(scene: Scene, server: Server) -> None:
    """It has no version, and what it is asked for now waits until it has one."""
    assert scene.run(server.client.model_info()).weight_version == NO_VERSION

    async def impatient() -> None:
        sampling = Sampling(temperature=1.0, max_new_tokens=3)
        async with asyncio.timeout(0.3):
            await server.client.generate([(3, 4)], sampling, [f"w{time.monotonic()}"])

    with pytest.raises(TimeoutError):
        scene.run(impatient())


async def held_while_it_ran(client: SglangClient, sampling: Sampling) -> str:
    """Hold the server while it generates; how the generation ended. Neither too early nor too late takes tries."""
    delay_s = 0.1
    for number in range(20):
        rids = [f"held-{number}-{k}" for k in range(16)]
        running = asyncio.create_task(client.generate([(3, 4)] * 16, sampling, rids))
        await asyncio.sleep(delay_s)
        was_over = running.done()
        await hold(client, LONG_S)
        await asyncio.wait({running}, timeout=2.0)
        if running.done() and running.exception() is not None:
            return str(running.exception())
        delay_s *= 0.7 if was_over else 1.5
        await let_go(client, 600, LONG_S)
        await running
    raise AssertionError("never met the generation at work")


def publisher_of(scene: Scene, pool: ServerPool, folder: Path, route: str) -> Publisher:
    """What a run uses, with buckets so small that an update has a middle."""
    recipe = Recipe(
        device="cpu",
        student=StudentConfig(path=str(scene.models["first"])),
        weight_sync=WeightSyncConfig(
            route=route, timeout_s=LONG_S, verify_tolerance_nats=TOLERANCE_NATS
        ),
    )
    roles = Roles(pool, {}, scene.link)
    publisher = Publisher(recipe, RunDir(folder), roles, RunConsole(1))
    publisher.probes = list(PROBES)
    if isinstance(publisher._route, BroadcastRoute):
        publisher._route._bucket_bytes = BUCKET_BYTES
    for client in scene.clients:
        pool.admit(client, scene.version)
    return publisher
