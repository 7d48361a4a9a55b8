"""Our routing (`serving/pool.py`) against `sglang-router`, in front of the same real SGLang servers on CPU.

    python -m benchmarks.router --router-python VENV/bin/python [--write-docs]

VENV holds the package alone (`pip install sglang-router==0.3.2`); nothing of it is in this repository. Two servers of
the demo's student; every case is carried out by our client, through our pool or through the router as its one server.
The router takes one name a request, not a list, so a group goes through it as requests of one sequence each.

    latency    one token for one prompt, one request after the other: what a hop costs
    mixed      many requests, a few long and many short, at once: how well the load is spread
    scores     top-K of long sequences as base64 arrays: do they come through whole, and how fast
    dead       a server is killed under load: what callers see, and when all is done
    routes     which of the things that a run needs of a server it can reach

Left out: several machines, and the router's cache-aware policy at its best, long shared prefixes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import environment
from benchmarks.report import table, write_between_markers
from opd_megatron.config.schema import ServerConfig
from opd_megatron.errors import OpdError
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.command import server_command
from opd_megatron.serving.keys import ServerKeys, new_keys, write_keys
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling, score_body

ROOT = environment.ROOT
DOCS_PAGE = ROOT / "docs" / "benchmarks.md"
RECORD = ROOT / "benchmarks" / "results" / "router-cpu.json"
STUDENT = ROOT / "recipes" / "demo" / "student"
VOCAB, TOPK = 32, 32
POLICIES = ("cache_aware", "round_robin", "power_of_two")
_CONFIG = ServerConfig(context_length=512, max_total_tokens=32768, dtype="float32")
Asker = SglangClient | ServerPool


@dataclass(frozen=True, slots=True)
class FixedLength(Sampling):
    """As many tokens as asked for: the end token ends nothing."""

    def as_request(self) -> dict[str, Any]:
        return {**Sampling.as_request(self), "ignore_eos": True}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start_server(folder: Path, port: int) -> psutil.Popen:
    command = server_command(
        _CONFIG,
        device="cpu",
        model_path=STUDENT,
        port=port,
        keys_file=folder / "keys.json",
        seed=0,
        parent_pid=os.getpid(),
    )
    with (folder / f"{port}.log").open("wb") as log:
        return psutil.Popen(
            command.argv, env={**os.environ, **command.env}, stdout=log, stderr=subprocess.STDOUT
        )


@contextmanager
def router(python: str, policy: str, urls: Sequence[str], keys: ServerKeys) -> Iterator[str]:
    """A router process with its defaults but for the policy; yields its URL."""
    port = free_port()
    command = [
        *(python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)),
        *("--policy", policy, "--api-key", keys.api, "--log-level", "error"),
        *("--prometheus-port", str(free_port()), "--worker-urls", *urls),
    ]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        for member in [*process.children(recursive=True), process]:
            member.kill()
        process.wait(10)


def _prompt(number: int) -> tuple[int, ...]:
    """A prompt of its own, so that no cached prefix helps."""
    digits = f"{number:06b}"
    return tuple(5 + int(digit) for digit in digits) + tuple(8 + (number * k) % 20 for k in (1, 3))


async def latency(asker: Asker, count: int = 150) -> dict[str, float]:
    sampling = FixedLength(temperature=1.0, max_new_tokens=1)
    seconds: list[float] = []
    for number in range(count):
        begin = time.perf_counter()
        await asker.generate([_prompt(number)], sampling, [f"l{begin}-{number}"])
        seconds.append(time.perf_counter() - begin)
    seconds = sorted(seconds[10:])
    return {"p50_ms": 1e3 * median(seconds), "p95_ms": 1e3 * seconds[int(0.95 * len(seconds))]}


async def _many(asker: Asker, lengths: Sequence[int], name: str) -> list[BaseException | None]:
    """All requests at once; for each the error that its caller got, or None."""

    async def ask(number: int, length: int) -> None:
        sampling = FixedLength(temperature=1.0, max_new_tokens=length)
        await asker.generate(
            [_prompt(number)] * 4, sampling, [f"{name}-{number}-{k}" for k in range(4)]
        )

    tasks = [ask(number, length) for number, length in enumerate(lengths)]
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, OpdError):
            raise outcome
    return outcomes


async def mixed(asker: Asker, name: str) -> dict[str, float]:
    """Groups of four, one in eight of them long."""
    lengths = [200 if number % 8 == 0 else 20 for number in range(32)]
    begin = time.perf_counter()
    failed = [outcome for outcome in await _many(asker, lengths, f"{name}{begin}") if outcome]
    assert not failed, failed
    return {"seconds": time.perf_counter() - begin}


async def scores(asker: Asker, repeats: int = 5) -> dict[str, Any]:
    response = tuple(4 + number % 28 for number in range(480))
    seconds: list[float] = []
    rows = 0
    for number in range(repeats):
        sequences = [((*_prompt(8 * number + k),), response) for k in range(8)]
        begin = time.perf_counter()
        answers = await asker.score(sequences, TOPK)
        seconds.append(time.perf_counter() - begin)
        rows = sum(0 if a.topk_ids is None else len(a.topk_ids) for a in answers)
    return {"seconds": min(seconds), "rows": rows}


async def dead(asker: Asker, victim: psutil.Popen, name: str) -> dict[str, Any]:
    """Kill a server while 32 groups are under way."""
    begin = time.perf_counter()
    running = asyncio.create_task(_many(asker, [150] * 32, f"{name}{begin}"))
    await asyncio.sleep(0.5)
    for process in [*victim.children(recursive=True), victim]:
        process.kill()
    killed = time.perf_counter()
    outcomes = await running
    errors = [str(outcome)[:160] for outcome in outcomes if outcome is not None]
    return {
        "groups": len(outcomes),
        "lost": len(errors),
        "seconds_after_kill": time.perf_counter() - killed,
        "first_error": errors[0] if errors else "",
    }


async def routes(client: SglangClient, keys: ServerKeys) -> dict[str, str]:
    """What teachers, the weight update and the pool need of one particular server."""

    async def try_it(work: Any) -> str:
        try:
            await work
        except OpdError as error:
            return f"refused: status {str(error).partition('status ')[2][:130].strip(': ')}"
        return "answered, by one server or all"

    sampling = FixedLength(temperature=1.0, max_new_tokens=1)
    async with SglangClient("router", client.url, keys, vocab_size=VOCAB) as plain:
        group = await try_it(plain.generate([_prompt(1)] * 2, sampling, ["one", "two"]))
    body = score_body([(_prompt(1), (4, 5, 6))], ["compact"], TOPK)
    (answer,) = await client._http.request_once("POST", "/generate", key=keys.api, body=body)
    is_compact = "input_top_logprobs_val_flat_b64" in answer["meta_info"]
    return {
        "a group in one request": group,
        "top-K in base64": "comes through" if is_compact else "lost: the answer has nested lists",
        "model_info": await try_it(client.model_info()),
        "weights: label": await try_it(client.weights.set_label("5", 10.0)),
        "weights: pause": await try_it(client.weights.pause(10.0)),
        "weights: load": await try_it(client.weights.load_directory(STUDENT, 5, 20.0)),
        "checksums": await try_it(client.weight_checksums()),
    }


class Scene:
    """Two servers, and askers in front of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, new_keys()
        write_keys(folder / "keys.json", self.keys)
        self.ports = [free_port(), free_port()]
        self.servers = [start_server(folder, port) for port in self.ports]

    def client(self, name: str, url: str) -> SglangClient:
        return SglangClient(name, url, self.keys, vocab_size=VOCAB, timeout_s=120.0)

    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def clients(self) -> list[SglangClient]:
        return [self.client(f"server-{n}", url) for n, url in enumerate(self.urls())]

    def pool(self, clients: Sequence[SglangClient]) -> ServerPool:
        pool = ServerPool("rollout", clients, return_timeout_s=60.0, say=lambda _: None)
        for client in clients:
            pool.admit(client, 0)
        return pool

    async def ready(self) -> None:
        for client in self.clients():
            await client.wait_ready(180.0)
            await client.close()

    async def replace(self, number: int) -> None:
        """A new server in the place of one that was killed."""
        self.servers[number].wait(10)
        self.servers[number] = start_server(self.folder, self.ports[number])
        await self.ready()

    def end(self) -> None:
        for server in self.servers:
            if server.poll() is None:
                server.kill()
            server.wait(10)


class RouterClient(SglangClient):
    """Sends the sequences of a call one by one, side by side."""

    def __init__(self, url: str, keys: ServerKeys) -> None:
        super().__init__("router", url, keys, vocab_size=VOCAB, timeout_s=120.0)
        self._send_batch = self._http.request_once
        self._http.request_once = self._one_by_one

    async def _one_by_one(self, method: str, route: str, **options: Any) -> Any:
        batch = options.pop("body", None)
        if route != "/generate":
            return await self._send_batch(method, route, body=batch, **options)
        lists = {k: v for k, v in batch.items() if k in ("input_ids", "rid", "logprob_start_len")}
        alone = [
            self._send_batch(
                method, route, body=batch | {k: v[n] for k, v in lists.items()}, **options
            )
            for n in range(len(batch["rid"]))
        ]
        return await asyncio.gather(*alone)


async def _through_router(client: SglangClient) -> None:
    """Until it passes a request on."""
    deadline = time.monotonic() + 90.0
    sampling = FixedLength(temperature=1.0, max_new_tokens=1)
    while True:
        try:
            await client.generate([_prompt(1)], sampling, [f"ready{time.monotonic()}"])
            return
        except OpdError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)


async def measure(scene: Scene, python: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    await scene.ready()
    clients = scene.clients()
    found["one server, direct"] = {"latency": await latency(clients[0])}
    pool = scene.pool(clients)
    found["our pool"] = {
        "latency": await latency(pool),
        "mixed": [await mixed(pool, f"p{n}") for n in range(3)],
        "scores": await scores(pool),
        "dead": await dead(pool, scene.servers[1], "pd"),
    }
    await pool.close()
    for client in clients:
        await client.close()
    for policy in POLICIES:
        if scene.servers[1].poll() is not None:
            await scene.replace(1)
        with router(python, policy, scene.urls(), scene.keys) as url:
            async with RouterClient(url, scene.keys) as client:
                await _through_router(client)
                result: dict[str, Any] = {
                    "latency": await latency(client),
                    "mixed": [await mixed(client, f"{policy}{n}") for n in range(3)],
                    "scores": await scores(client),
                }
                if policy == POLICIES[0]:
                    result["dead"] = await dead(client, scene.servers[1], policy)
                if policy == POLICIES[-1]:  # Last of all: it may leave the servers paused.
                    found["routes"] = await routes(client, scene.keys)
                found[f"sglang-router, {policy}"] = result
    return found


def to_markdown(record: dict[str, Any]) -> str:
    machine, found = record["environment"], record["found"]
    rows: list[list[str]] = []
    for name, result in found.items():
        if name == "routes":
            continue
        spread = [case["seconds"] for case in result.get("mixed", [])]
        lost = result.get("dead")
        rows.append(
            [
                name,
                f"{result['latency']['p50_ms']:.2f} / {result['latency']['p95_ms']:.2f}",
                f"{median(spread):.2f} ({min(spread):.2f} to {max(spread):.2f})" if spread else "-",
                f"{result['scores']['seconds']:.3f}" if spread else "-",
                f"{lost['lost']} of {lost['groups']}" if lost else "-",
                f"{lost['seconds_after_kill']:.2f}" if lost else "-",
            ]
        )
    columns = [
        *("requests go through", "one token, p50 / p95 ms", "mixed lengths, s (3 runs)"),
        *("top-32 of 3,840 tokens, s", "groups lost at a kill", "done after it, s"),
    ]
    reached = "\n".join(f"- `{name}`: {what}" for name, what in found["routes"].items())
    lines = "\n".join(table(columns, rows))
    return (
        f"- {machine['cpu']}, {machine['cores']} cores; {record['router']}; commit {machine['commit']}, "
        f"{machine['date']}, load average at the start {machine['load_average_at_start']}\n\n{lines}\n\n"
        f"What a run asks of one server, asked of the router:\n\n{reached}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router")
    parser.add_argument(
        "--router-python", required=True, help="of an environment with sglang-router"
    )
    parser.add_argument("--write-docs", action="store_true", help="publish record and table")
    arguments = parser.parse_args()
    said = [arguments.router_python, "-m", "pip", "show", "sglang-router"]
    shown = subprocess.run(said, check=True, capture_output=True, text=True).stdout.splitlines()
    record: dict[str, Any] = {
        "environment": environment.describe("cpu"),
        "router": " ".join(line.split(": ")[1] for line in shown[:2]),
    }
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder))
        try:
            record["found"] = asyncio.run(measure(scene, arguments.router_python))
        finally:
            scene.end()
    print(json.dumps(record, indent=1))
    print(to_markdown(record))
    if arguments.write_docs:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        write_between_markers(DOCS_PAGE, "router cpu", to_markdown(record))


if __name__ == "__main__":
    main()
