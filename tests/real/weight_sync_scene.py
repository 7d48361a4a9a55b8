"""The real parts of the weight update tests: two Megatron ranks, two SGLang servers behind fault proxies."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psutil
from megatron_tiny import write_model
from rule_proxy import RuleProxy

from opd_megatron.config.schema import ServerConfig
from opd_megatron.controller.learner_link import LearnerLink
from opd_megatron.launch.ports import PortReservations
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.command import server_command
from opd_megatron.serving.keys import ServerKeys, new_keys, write_keys
from opd_megatron.weight_sync.broadcast import BroadcastRoute
from opd_megatron.weight_sync.disk import DiskRoute
from opd_megatron.weight_sync.route import WeightRoute
from opd_megatron.weight_sync.update import SyncReport, update_servers

REPOSITORY = Path(__file__).parents[2]
VOCAB = 67
PROBES = ((3, 4, 5, 6, 11, 12, 13), (7, 8, 14, 15))
TOLERANCE_NATS = 1e-4
BUCKET_BYTES = 40_000
LONG_S = 100.0
Result = TypeVar("Result")


@dataclass
class Server:
    """One SGLang server; `client` and the tests talk to it through `proxy`."""

    process: psutil.Popen
    proxy: RuleProxy
    client: SglangClient

    def processes(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.process.pid)
        return [*launcher.children(recursive=True), launcher]


@dataclass
class Scene:
    """What a test needs; `run` runs a coroutine in the one event loop of all."""

    work: Path
    models: dict[str, Path]
    runner: asyncio.Runner
    learner_process: subprocess.Popen[bytes]
    processes: list[Any]
    layout: str = ""
    version: int = 0
    servers: list[Server] = field(default_factory=list)
    links: dict[str, LearnerLink] = field(default_factory=dict)
    routes: dict[tuple[str, float], WeightRoute] = field(default_factory=dict)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    @property
    def link(self) -> LearnerLink:
        return self.links[self.layout]

    @property
    def clients(self) -> list[SglangClient]:
        return [server.client for server in self.servers]

    def use_layout(self, name: str) -> None:
        """Let the learner serve a layout; layouts come in the worker's order."""
        if self.layout == name:
            return
        if self.layout:
            self.run(self.link.ask("stop"))
            self.routes.clear()
        self.links[name] = LearnerLink(self.work / name, 3 * LONG_S)
        self.layout = name
        self.run(self.link.wait_ready(200.0, lambda _: self._check_learner()))

    def _check_learner(self) -> None:
        assert self.learner_process.poll() is None, (self.work / "learner.log").read_text()[-3000:]

    def hold(self, model: str) -> None:
        """Give the learner other weights."""
        self.run(self.link.ask("load", source="hf", path=str(self.models[model])))

    def route(self, name: str, timeout_s: float = LONG_S) -> WeightRoute:
        """The same one for the same settings."""
        if (name, timeout_s) not in self.routes:
            self.routes[name, timeout_s] = self._new_route(name, timeout_s)
        return self.routes[name, timeout_s]

    def _new_route(self, name: str, timeout_s: float) -> WeightRoute:
        if name == "disk":
            return DiskRoute(self.link, self.work / "weights", keep=2, timeout_s=timeout_s)
        return BroadcastRoute(
            self.link,
            tensor_parallel=1,
            model_path=self.models["first"],
            folder=self.work / self.layout,
            backend="gloo",
            bucket_bytes=BUCKET_BYTES,
            timeout_s=timeout_s,
        )

    def update(
        self,
        route: str,
        model: str,
        servers: Sequence[Server] | None = None,
        timeout_s: float = LONG_S,
    ) -> SyncReport:
        """Let the learner hold `model` and bring it to the servers as the next version."""
        self.hold(model)
        self.version += 1
        clients = [server.client for server in servers or self.servers]
        way = self.route(route, timeout_s)

        async def work() -> SyncReport:
            offer = await way.offer(self.version, PROBES)
            return await update_servers(way, clients, offer, tolerance_nats=TOLERANCE_NATS)

        return self.run(work())

    def restart(self, number: int) -> None:
        """Start a server that has ended anew, with the first model, as a supervisor does."""
        server = self.servers[number]
        port = urlsplit(server.proxy.target).port
        assert port is not None and server.process.poll() is not None
        server.process = _start_server(self.work, self.models["first"], port, number)
        self.processes.append(server.process)

    def checksums(self, server: Server) -> dict[str, str]:
        return self.run(server.client.weight_checksums())


def _start_server(work: Path, model: Path, port: int, number: int) -> psutil.Popen:
    command = server_command(
        ServerConfig(
            context_length=64, max_total_tokens=2048, dtype="float32", mem_fraction_static=0.1
        ),
        device="cpu",
        model_path=model,
        port=port,
        keys_file=work / "keys.json",
        seed=number,
        parent_pid=os.getpid(),
    )
    with (work / f"server{number}.log").open("ab") as log:
        return psutil.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _start_learner(work: Path, model: Path) -> subprocess.Popen[bytes]:
    for layout in ("tp2", "pp2"):
        (work / layout).mkdir()
    worker = Path(__file__).with_name("weight_sync_worker.py")
    with (work / "learner.log").open("wb") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "opd_megatron.megatron.torchrun", "--opd-fork"),
                *("--nproc-per-node", "2", str(worker), str(work), str(model)),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


async def _connect(process: psutil.Popen, port: int, number: int, keys: ServerKeys) -> Server:
    proxy = RuleProxy(f"http://127.0.0.1:{port}")
    await proxy.start()
    client = SglangClient(f"rollout-{number}", proxy.url, keys, vocab_size=VOCAB, timeout_s=LONG_S)
    return Server(process, proxy, client)


async def _wait_ready(scene: Scene) -> None:
    async def wait(server: Server, number: int) -> None:
        def alive(*_: object) -> None:
            log = scene.work / f"server{number}.log"
            assert server.process.poll() is None, log.read_text()[-3000:]

        await server.client.wait_ready(200.0, alive)

    await asyncio.gather(*(wait(server, n) for n, server in enumerate(scene.servers)))


@contextmanager
def open_scene(work: Path, num_servers: int) -> Iterator[Scene]:
    """Start everything; end everything."""
    models = {
        name: write_model(
            work / name,
            seed=seed,
            num_hidden_layers=2,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        )
        for seed, name in enumerate(("first", "second"))
    }
    keys = new_keys()
    write_keys(work / "keys.json", keys)
    processes: list[Any] = []
    with PortReservations() as ports, asyncio.Runner() as runner:
        try:
            learner = _start_learner(work, models["first"])
            processes.append(learner)
            scene = Scene(work, models, runner, learner, processes)
            for number in range(num_servers):
                port = ports.reserve()
                processes.append(_start_server(work, models["first"], port, number))
                scene.servers.append(runner.run(_connect(processes[-1], port, number, keys)))
            runner.run(_wait_ready(scene))
            yield scene
            for server in scene.servers:
                runner.run(server.client.close())
                runner.run(server.proxy.stop())
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait(10)
