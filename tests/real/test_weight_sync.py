"""One contract for both routes of new weights: real Megatron ranks (TP 2, then PP 2), real SGLang servers on CPU.

Tests run in file order: the layout changes once, and the last ones kill the servers. Faults are made by a proxy in
front of each server, at an exact request. Not covered: NCCL, servers of several ranks.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from rule_proxy import Rule, refuse
from weight_sync_scene import PROBES, TOLERANCE_NATS, Scene, Server, open_scene

from opd_megatron.errors import NumericsError, ServerError
from opd_megatron.serving.client import NO_VERSION, Sampling
from opd_megatron.weight_sync.broadcast import BroadcastRoute
from opd_megatron.weight_sync.route import hold, let_go
from opd_megatron.weight_sync.update import update_servers

pytestmark = pytest.mark.real

ROUTES = ("disk", "broadcast")
# The request that carries weights, and which of its repetitions stands in the middle of an update.
WEIGHTS = {"disk": "/update_weights_from_disk", "broadcast": "/update_weights_from_distributed"}
HALF_WAY = {"disk": 1, "broadcast": 3}
SHORT_S = 3.0
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
        scene.run(server.client.weights.load_directory(path, version, 30.0))
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


def check_learner_answers(scene: Scene) -> None:
    started = time.monotonic()
    scene.hold("first")
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("layout", ["tp2"])
@routes
def test_new_weights_arrive_bit_exactly_and_give_the_version(
    scene: Scene, wanted: dict[str, dict[str, str]], layout: str, route: str
) -> None:
    arrive_twice(scene, wanted, route)


def arrive_twice(scene: Scene, wanted: dict[str, dict[str, str]], route: str) -> None:
    for model in ("second", "first"):
        report = scene.update(route, model)
        assert report.max_delta < TOLERANCE_NATS and report.first_failure is None
        for server in scene.servers:
            check_held(scene, server, wanted[model])


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

    async def update() -> None:
        long = Sampling(temperature=1.0, max_new_tokens=55)
        rids = [f"held-{number}" for number in range(16)]
        running = asyncio.create_task(client.generate([(3, 4)] * 16, long, rids))
        await asyncio.sleep(0.1)
        await hold(client, 30.0)
        with pytest.raises(ServerError, match="aborted"):
            await running
        waiting = asyncio.create_task(client.generate([(3, 4)], long, ["waits"]))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await let_go(client, 700, 30.0)
        (generation,) = await waiting
        assert (generation.version_first, generation.version_last) == (700, 700)

    scene.run(update())


def test_weights_that_were_trained_on_since_the_offer_are_not_sent(scene: Scene) -> None:
    scene.hold("second")
    route = scene.route("broadcast")
    offer = scene.run(route.offer(800, PROBES))
    assert isinstance(route, BroadcastRoute)
    route._optimizer_step += 1
    with pytest.raises(ServerError, match="the learner is at step 0, offered was 1"):
        scene.run(update_servers(route, scene.clients, offer, tolerance_nats=TOLERANCE_NATS))
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
    # Far below the timeout of 30 s: the refusal itself ends the learner's wait.
    assert time.monotonic() - started < 10.0
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
    assert time.monotonic() - started < 15.0
    assert type(caught.value) is ServerError and caught.value.exit_code == 75
    assert "rollout-0 (" not in str(caught.value)
    for server in scene.servers:
        check_unusable(scene, server)
    check_learner_answers(scene)
    scene.servers[1].proxy.rules.clear()
    scene.update(route, "second")
    for server in scene.servers:
        check_held(scene, server, wanted["second"])


def test_a_server_that_refuses_to_join_ends_the_update(scene: Scene) -> None:
    scene.servers[0].proxy.rules.append(Rule("/init_weights_update_group", refuse))
    scene.routes.clear()
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"joining the broadcast group: 1 of 2.*rollout-0"):
        scene.update("broadcast", "first")
    assert time.monotonic() - started < 15.0
    for server in scene.servers:
        check_unusable(scene, server)
    scene.servers[0].proxy.rules.clear()
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
        # The deadline of the learner, of the server, and of three requests while cleaning up.
        assert time.monotonic() - started < 6 * SHORT_S + 5.0
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
    arrive_twice(scene, wanted, route)


@pytest.mark.parametrize(("victim", "route"), [(1, "broadcast"), (0, "disk")])
def test_a_server_killed_half_way_is_named_and_the_others_go_on(
    scene: Scene, wanted: dict[str, dict[str, str]], victim: int, route: str
) -> None:
    doomed = scene.servers[victim]
    in_use = scene.servers[: victim + 1]

    async def kill(_: dict[str, Any]) -> None:
        processes = doomed.processes()
        for process in processes:
            process.kill()
        await asyncio.to_thread(psutil.wait_procs, processes, 5)

    doomed.proxy.rules.append(Rule(WEIGHTS[route], kill, HALF_WAY[route], HALF_WAY[route]))
    started = time.monotonic()
    with pytest.raises(ServerError, match=rf"rollout-{victim} .*not tried again"):
        scene.update(route, "second", in_use)
    assert time.monotonic() - started < 15.0
    check_learner_answers(scene)
    for server in in_use[:victim]:
        check_unusable(scene, server)
    for way in ROUTES if victim else ():
        scene.update(way, "second", in_use[:victim])
        check_held(scene, in_use[0], wanted["second"])
