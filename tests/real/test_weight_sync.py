"""One contract for both routes of new weights: real Megatron ranks (TP 2, then PP 2), real SGLang servers on CPU.

Tests run in file order: the layout changes once, and the last ones kill a server. Faults are made by a proxy in front
of each server, at an exact request. A passing test is far from its deadlines: they are for a machine that is busy. Not
covered: NCCL, servers of several ranks.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rule_proxy import Rule, refuse
from weight_sync_checks import (
    check_held,
    check_unusable,
    held_while_it_ran,
    publisher_of,
)
from weight_sync_scene import BUCKET_BYTES, LONG_S, PROBES, TOLERANCE_NATS, Scene, open_scene

from opd_megatron.errors import NumericsError, ServerError
from opd_megatron.serving.contract import Generation
from opd_megatron.serving.members import State
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.weight_sync.broadcast import BroadcastRoute
from opd_megatron.weight_sync.route import let_go
from opd_megatron.weight_sync.update import update_servers

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

ROUTES = ("disk", "broadcast")
# The request that carries weights, and which of its repetitions stands in the middle of an update.
WEIGHTS = {"disk": "/update_weights_from_disk", "broadcast": "/update_weights_from_distributed"}
HALF_WAY = {"disk": 1, "broadcast": 3}
# Long enough for an update of healthy servers; a hanging one costs a few of them.
SHORT_S = 3.0
# Nobody waited for a deadline, which would take LONG_S.
AT_ONCE_S = LONG_S / 2
routes = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with open_scene(tmp_path_factory.mktemp("sync"), num_servers=2) as made:
        made.use_layout("tp2")
        yield made


@pytest.fixture(scope="module")
def wanted(scene: Scene) -> dict[str, dict[str, str]]:
    """Checksums of a server that loaded each model directory itself."""
    found = {}
    server = scene.servers[0]
    for version, (name, path) in enumerate(scene.models.items(), start=900):
        scene.run(server.client.weights.load_directory(path, version, LONG_S))
        found[name] = scene.checksums(server)
    assert found["first"] != found["second"]
    return found


@pytest.fixture(autouse=True)
def no_faults_left(scene: Scene) -> Iterator[None]:
    yield
    for server in scene.servers:
        server.proxy.rules.clear()


async def forward(_: dict[str, Any]) -> None:
    return None


def check_learner_answers(scene: Scene) -> None:
    started = time.monotonic()
    scene.hold("first")
    assert time.monotonic() - started < AT_ONCE_S


@pytest.mark.parametrize("layout", ["tp2"])
@routes
def test_new_weights_arrive_bit_exactly_and_give_the_version(
    scene: Scene, wanted: dict[str, dict[str, str]], layout: str, route: str
) -> None:
    assert arrive_twice(scene, wanted, route) < TOLERANCE_NATS


def arrive_twice(scene: Scene, wanted: dict[str, dict[str, str]], route: str) -> float:
    """Largest difference of a probe's log-probs, in nats; that every server holds every bit is asserted here."""
    deltas: list[float] = []
    for model in ("second", "first"):
        report = scene.update(route, model)
        assert report.first_failure is None
        deltas.append(report.max_delta)
        for server in scene.servers:
            check_held(scene, server, wanted[model])
    return max(deltas)


def test_the_group_is_joined_once_and_its_port_is_on_loopback(scene: Scene) -> None:
    joined = Rule("/init_weights_update_group", forward)
    scene.servers[1].proxy.rules.append(joined)
    for model in ("second", "first"):
        scene.update("broadcast", model)
    assert joined.seen == 0
    addresses = {
        connection.laddr.ip
        for process in psutil.Process(scene.learner_process.pid).children(recursive=True)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_what_runs_when_an_update_begins_is_ended_and_what_comes_then_waits(scene: Scene) -> None:
    client = scene.servers[0].client
    long = Sampling(temperature=1.0, max_new_tokens=55)

    async def update() -> None:
        assert "aborted" in await held_while_it_ran(client, long)
        waiting = asyncio.create_task(client.generate([(3, 4)], long, ["waits"]))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await let_go(client, 700, LONG_S)
        (generation,) = await waiting
        assert (generation.version_first, generation.version_last) == (700, 700)

    scene.run(update())


@routes
def test_rollouts_under_way_go_on_with_the_new_weights(scene: Scene, route: str) -> None:
    """Every token keeps the version that wrote it, and its log-prob is that of the weights of this version alone."""
    scene.update(route, "first")
    old = scene.version
    scene.hold("second")
    way = scene.route(route)

    async def work() -> list[Generation]:
        long = Sampling(temperature=1.0, max_new_tokens=55)
        rids = [f"kept-{route}-{number}" for number in range(16)]
        client = scene.servers[0].client
        offer = await way.offer(old + 1, PROBES)
        running = asyncio.create_task(client.generate([(3, 4)] * 16, long, rids))
        await asyncio.sleep(0.1)
        await update_servers(
            way, scene.clients, offer, tolerance_nats=TOLERANCE_NATS, keep_requests=True
        )
        return await running

    generations = scene.run(work())
    scene.version = old + 1
    mixed = [g for g in generations if g.spans]
    # Some end before, with an end token.
    assert len(mixed) >= 2, [(g.version_first, g.version_last) for g in generations]
    for model, version in (("first", old), ("second", old + 1)):
        scene.hold(model)
        ids = [[3, 4, *g.token_ids] for g in mixed]
        answer = scene.run(scene.link.ask("offer", bucket_bytes=BUCKET_BYTES, probe_tokens=ids))
        for generation, logprobs in zip(mixed, answer["probe_logprobs"], strict=True):
            (_, end), _ = generation.spans
            assert [v for v, _ in generation.spans] == [old, old + 1]
            own = slice(0, end) if version == old else slice(end, None)
            learner = np.asarray(logprobs)[1:]  # The first is of the prompt's second token.
            assert np.abs(learner - generation.logprobs)[own].max() < TOLERANCE_NATS
            assert np.abs(learner - generation.logprobs).max() > 100 * TOLERANCE_NATS


def test_weights_that_were_trained_on_since_the_offer_are_not_sent(scene: Scene) -> None:
    scene.hold("second")
    route = scene.route("broadcast")
    offer = scene.run(route.offer(800, PROBES))
    assert isinstance(route, BroadcastRoute)
    route._optimizer_step += 1
    started = time.monotonic()
    with pytest.raises(ServerError, match="the learner is at step 0, offered was 1"):
        scene.run(update_servers(route, scene.clients, offer, tolerance_nats=TOLERANCE_NATS))
    # The learner takes no part, and says so to the servers that wait for it.
    assert time.monotonic() - started < AT_ONCE_S
    check_learner_answers(scene)


@routes
def test_an_update_that_changed_nothing_is_caught(scene: Scene, route: str) -> None:
    scene.update(route, "first")

    async def mislead(body: dict[str, Any]) -> None:
        if route == "disk":
            body["model_path"] = str(scene.models["first"])
        else:
            body["names"] = [f"model.unknown.{n}" for n in range(len(body["names"]))]

    scene.servers[1].proxy.rules.append(Rule(WEIGHTS[route], mislead))
    with pytest.raises(
        NumericsError, match=r"1 of 2 servers succeeded: rollout-1: does not hold"
    ) as caught:
        scene.update(route, "second")
    assert "rollout-0:" not in str(caught.value)
    scene.servers[1].proxy.rules.clear()
    assert scene.update(route, "second").max_delta < TOLERANCE_NATS


@routes
def test_a_server_that_refuses_once_gets_the_whole_update_again(
    scene: Scene, wanted: dict[str, dict[str, str]], route: str
) -> None:
    half = HALF_WAY[route]
    scene.servers[0].proxy.rules.append(Rule(WEIGHTS[route], refuse, half, half))
    started = time.monotonic()
    report = scene.update(route, "first")
    # The refusal itself ends the learner's wait.
    assert time.monotonic() - started < AT_ONCE_S
    assert report.first_failure is not None
    assert "rollout-0" in report.first_failure and "refused on purpose" in report.first_failure
    for server in scene.servers:
        check_held(scene, server, wanted["first"])


@routes
def test_a_server_that_always_refuses_ends_the_update_named_and_unusable(
    scene: Scene, wanted: dict[str, dict[str, str]], route: str
) -> None:
    scene.servers[1].proxy.rules.append(Rule(WEIGHTS[route], refuse, HALF_WAY[route]))
    started = time.monotonic()
    with pytest.raises(
        ServerError, match=r"1 of 2 servers.*rollout-1.*refused on purpose.*tried twice"
    ) as caught:
        scene.update(route, "second")
    assert time.monotonic() - started < AT_ONCE_S
    assert type(caught.value) is ServerError and caught.value.exit_code == 75
    assert "rollout-0 (" not in str(caught.value)
    for server in scene.servers:
        check_unusable(scene, server)
    check_learner_answers(scene)
    scene.servers[1].proxy.rules.clear()
    scene.update(route, "second")
    for server in scene.servers:
        check_held(scene, server, wanted["second"])


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_a_server_that_refuses_to_join_ends_the_update(scene: Scene, late_s: float) -> None:
    """The other is on its way to the meeting point, or sets out after the learner gave it up."""

    async def wait(_: dict[str, Any]) -> None:
        await asyncio.sleep(late_s)

    join = "/init_weights_update_group"
    scene.servers[0].proxy.rules.append(Rule(join, refuse))
    scene.servers[1].proxy.rules.append(Rule(join, wait))
    scene.routes.clear()
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"joining the broadcast group: 1 of 2.*rollout-0"):
        scene.update("broadcast", "first")
    assert time.monotonic() - started < AT_ONCE_S
    for server in scene.servers:
        check_unusable(scene, server)
        server.proxy.rules.clear()
    scene.update("broadcast", "first")


@routes
def test_a_server_that_hangs_half_way_holds_up_nobody(
    scene: Scene, wanted: dict[str, dict[str, str]], route: str
) -> None:
    victim = scene.servers[1]
    stopped: list[psutil.Process] = []

    async def stop(_: dict[str, Any]) -> None:
        if not stopped:
            stopped.extend(victim.processes())
            for process in stopped:
                process.send_signal(signal.SIGSTOP)

    victim.proxy.rules.append(Rule(WEIGHTS[route], stop, HALF_WAY[route]))
    started = time.monotonic()
    try:
        with pytest.raises(ServerError, match=r"rollout-1.*no answer within.*not tried again"):
            scene.update(route, "second", timeout_s=SHORT_S)
        # The deadlines of the learner, of the server, and of what is asked of it while cleaning up.
        assert time.monotonic() - started < AT_ONCE_S
        check_learner_answers(scene)
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    assert stopped
    check_unusable(scene, scene.servers[0])
    victim.proxy.rules.clear()
    scene.run(asyncio.sleep(0.5))
    scene.update(route, "second")
    for server in scene.servers:
        check_held(scene, server, wanted["second"])


@pytest.mark.parametrize("layout", ["pp2"])
@routes
def test_weights_of_pipeline_stages_arrive_bit_exactly_too(
    scene: Scene, wanted: dict[str, dict[str, str]], layout: str, route: str
) -> None:
    scene.use_layout(layout)
    assert arrive_twice(scene, wanted, route) < TOLERANCE_NATS


@pytest.mark.parametrize(
    "route",
    # A server takes a quarter of a minute to start; by disk, a whole run does this in test_faults.
    ["broadcast", pytest.param("disk", marks=pytest.mark.slow)],
)
def test_a_server_killed_half_way_is_left_out_until_it_is_back_updated_and_verified(
    scene: Scene, wanted: dict[str, dict[str, str]], tmp_path: Path, route: str
) -> None:
    victim = scene.servers[1]
    said: list[str] = []
    pool = ServerPool("rollout", scene.clients, return_timeout_s=200.0, say=said.append)
    publisher = publisher_of(scene, pool, tmp_path, route)

    async def kill(_: dict[str, Any]) -> None:
        processes = victim.processes()
        for process in processes:
            process.kill()
        await asyncio.to_thread(psutil.wait_procs, processes, 10)

    async def push(model: str) -> None:
        await scene.link.ask("load", source="hf", path=str(scene.models[model]))
        scene.version += 1
        await publisher.push(await publisher.publish(scene.version))

    async def story() -> None:
        await push("first")
        half = HALF_WAY[route]
        victim.proxy.rules.append(Rule(WEIGHTS[route], kill, half, half))
        started = time.monotonic()
        await push("second")
        assert time.monotonic() - started < AT_ONCE_S
        assert pool.states == {"rollout-0": State.IN_SERVICE, "rollout-1": State.OUT}
        assert [line for line in said if line.startswith("rollout-1 is out of service: ")] == said
        sampling = Sampling(temperature=1.0, max_new_tokens=3)
        (answer,) = await pool.generate([(3, 4)], sampling, ["meanwhile"])
        assert answer.version_first == scene.version
        scene.restart(1)
        async with asyncio.timeout(200):
            while pool.states["rollout-1"] is not State.IN_SERVICE:
                await asyncio.sleep(0.05)
        assert f"with weights v{scene.version}" in said[-1]
        for server in scene.servers:
            assert await server.client.weight_checksums() == wanted["second"]
        await push("first")

    try:
        scene.run(story())
    finally:
        scene.run(pool.close())
    for server in scene.servers:
        check_held(scene, server, wanted["first"])
    assert (pool.counts.left, pool.counts.returned) == (1, 1)
