"""Two real servers behind a pool, with a proxy before each that injects faults: nothing wrong is accepted, every fault
has its witness, nothing hangs, and a server that was killed comes back updated and verified."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import COUNTED_AS, FAULTS, LATE, FaultProxy
from tiny_servers import (
    VOCAB,
    RunningServer,
    launch,
    make_model,
    of_ids,
    probe_logprobs,
    reference_logprobs,
    running,
)
from whole_runs import SMALL, check_finished, check_nothing_runs, of_role, start, wait_until

from opd_megatron.errors import OpdError, RequestRefused
from opd_megatron.rundir import RunDir
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.members import State
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.weight_sync.route import Offer
from opd_megatron.weight_sync.verify import verify_weights

pytestmark = pytest.mark.real

VERSION = 7
SAMPLING = Sampling(temperature=1.0, max_new_tokens=6)
PROBES = ((3, 4, 5, 6, 11, 12),)
AT_ONCE = 6


@dataclass
class Two:
    """Two servers of the same model at the same version; `other` holds other weights."""

    servers: list[RunningServer]
    model: Path
    other: Path
    folder: Path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("faults")
    model, other = (make_model(folder / name, seed) for seed, name in enumerate("ab"))
    with running(folder, model, 2) as servers:
        started = Two(list(servers), model, other, folder)
        yield started
        for server in started.servers:
            if server not in servers and server.process.poll() is None:
                server.kill()


@dataclass
class Answers:
    """What reached the callers: ids with their log-probs and temperature, and errors by type."""

    accepted: list[tuple[tuple[int, ...], tuple[int, ...], Any]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    def check_all(self, model: Path) -> float:
        """Largest |answer - transformers| over everything accepted."""
        worst = 0.0
        for prompt, response, logprobs in self.accepted:
            wanted_TV = reference_logprobs(model, prompt + response)
            wanted = of_ids(wanted_TV[len(prompt) - 1 :], response)
            worst = max(worst, float(np.abs(logprobs - wanted).max()))
        return worst


class Callers:
    """Some callers that ask the pool for generations and scores, one after the other."""

    def __init__(self, pool: ServerPool) -> None:
        self.pool, self.answers = pool, Answers()

    async def ask(self, number: int) -> None:
        prompt = (3, 4 + number % 8, 5)
        response = tuple(10 + (number * 7 + k) % 50 for k in range(5))
        try:
            if number % 2:
                rids = [f"r{number}-{k}" for k in range(2)]
                for one in await self.pool.generate([prompt] * 2, SAMPLING, rids):
                    self.answers.accepted.append((prompt, one.token_ids, one.logprobs))
            else:
                (score,) = await self.pool.score([(prompt, response)], 4)
                self.answers.accepted.append((prompt, response, score.logprobs))
        except RequestRefused:
            self.answers.refused += 1
        except OpdError as error:
            self.answers.errors[type(error).__name__] += 1

    async def ask_all(self, count: int, at_once: int = AT_ONCE) -> None:
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await self.ask(number)

        await asyncio.gather(*(work() for _ in range(at_once)))


async def open_pool(two: Two, urls: list[str], stack: AsyncExitStack, **options: Any) -> ServerPool:
    """A pool over these addresses; servers that come back are updated and verified at their own address."""
    settings = {"vocab_size": VOCAB, "max_retries": 0, **options}
    clients = [
        SglangClient(f"rollout-{number}", url, two.servers[0].keys, **settings)
        for number, url in enumerate(urls)
    ]
    pool = ServerPool("rollout", clients, return_timeout_s=120.0, say=lambda line: None)
    offer = Offer(VERSION, PROBES, probe_logprobs(two.model, PROBES))

    async def bring_up(client: SglangClient) -> int:
        server = two.servers[int(client.name[-1])]
        async with SglangClient("direct", server.url, server.keys, vocab_size=VOCAB) as direct:
            await direct.weights.load_directory(two.model, VERSION, 60.0)
            await verify_weights(direct, offer, tolerance_nats=1e-4)
        return VERSION

    pool.bring_up = bring_up
    for client in clients:
        stack.push_async_callback(client.close)
        pool.admit(client, VERSION)
    stack.push_async_callback(pool.close)
    return pool


@pytest.mark.timeout(600)
def test_every_injected_fault_has_a_witness_and_no_wrong_answer_is_accepted(two: Two) -> None:
    calls = 300

    async def run() -> tuple[Callers, Counter[str], int]:
        async with AsyncExitStack() as stack:
            # With these seeds every fault is among the first 62 requests to either.
            proxies = [
                await stack.enter_async_context(FaultProxy(server.url, seed, 0.35))
                for seed, server in enumerate(two.servers, 10)
            ]
            # Longer than a busy machine stands still: the proxy may not know of a caller that gave up meanwhile.
            pool = await open_pool(two, [p.url for p in proxies], stack, timeout_s=20.0)
            callers = Callers(pool)
            async with asyncio.timeout(400):
                await callers.ask_all(calls)
            told_to_wait = sum(client.told_to_wait for client in pool.clients)
            return callers, proxies[0].injected + proxies[1].injected, told_to_wait

    callers, injected, told_to_wait = asyncio.run(run())
    print(dict(injected), dict(callers.pool.counts.failures), dict(callers.answers.errors))
    assert set(injected) - {LATE} == set(FAULTS)
    # Every fault was noticed as what it is, once: nothing was swallowed and nothing was counted twice.
    wanted: Counter[str] = Counter()
    for fault, counted in COUNTED_AS.items():
        wanted[counted] += injected[fault]
    wanted["no answer"] += injected[LATE]
    failures = Counter(callers.pool.counts.failures)
    # A server that said "later" gets few requests at once: behind one that hangs, others wait and may give up, too.
    behind = failures["no answer"] - wanted["no answer"]
    assert 0 <= behind <= (AT_ONCE - 1) * injected["hang"]
    assert failures - Counter({"no answer": behind}) == wanted
    assert told_to_wait == injected["429"] + injected["503"]
    assert callers.answers.refused == injected["400"]
    # Every call ended, in an answer that is right or in a typed error.
    answers = callers.answers
    assert len(answers.accepted) > calls * 0.8
    assert sum(answers.errors.values()) < calls * 0.2
    assert answers.check_all(two.model) < 1e-4


def test_work_of_a_killed_server_goes_elsewhere_until_it_is_back_updated_and_verified(
    two: Two,
) -> None:
    """It is started again with other weights under the same label: only the update makes it right."""

    async def run() -> tuple[Callers, float]:
        async with AsyncExitStack() as stack:
            urls = [server.url for server in two.servers]
            pool = await open_pool(two, urls, stack, timeout_s=20.0)
            callers = Callers(pool)
            first = asyncio.create_task(callers.ask_all(60))
            await asyncio.sleep(0.15)
            dead = two.servers[0]
            dead.kill()
            killed = time.monotonic()
            await first
            assert pool.states["rollout-0"] is State.OUT
            again = await asyncio.to_thread(
                launch,
                two.folder,
                two.other,
                keys=dead.keys,
                port=dead.port,
                weight_version=VERSION,
            )
            two.servers[0] = again
            async with asyncio.timeout(150):
                while pool.states["rollout-0"] is not State.IN_SERVICE:
                    await callers.ask_all(6)
                    await asyncio.sleep(0.2)
            back_s = time.monotonic() - killed
            await callers.ask_all(60)
            assert (pool.counts.left, pool.counts.returned) == (1, 1)
            return callers, back_s

    callers, back_s = asyncio.run(run())
    print(f"back after {back_s:.1f} s, {len(callers.answers.accepted)} answers")
    assert not callers.answers.errors and not callers.answers.refused
    assert callers.answers.check_all(two.model) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("route", ["disk", "broadcast"])
def test_a_run_goes_on_when_its_only_servers_are_killed(tmp_path: Path, route: str) -> None:
    run, output = RunDir(tmp_path / "run"), tmp_path / "output.txt"
    settings = [*SMALL, "steps=5", f"weight_sync.route={route}"]
    arguments = ["run", "demo", *settings, "--run-dir", str(run.root)]
    process = start(*arguments, output=output)
    wait_until(
        lambda: any(run.checkpoints.glob("step_*")) or process.poll() is not None, 200, "a commit"
    )
    for role in ("rollout", "teacher"):
        for victim in of_role(run, role):
            victim.kill()
    assert process.wait(timeout=240) == 0, output.read_text()
    check_nothing_runs(run)
    check_finished(run, 5)
    text = output.read_text()
    for name in ("rollout-0", "teacher-main-0"):
        assert f"{name} ended with signal SIGKILL and is started again (1 of 3)" in text
    assert "rollout-0 is back after" in text
    assert len(run.attempts()) == 1
