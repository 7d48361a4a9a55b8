"""Real SGLang servers of a tiny random Qwen3 on CPU, started and ended by a test."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_megatron.config.schema import ServerConfig
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.command import ServerCommand, server_command
from opd_megatron.serving.keys import ServerKeys, new_keys, write_keys

VOCAB = 64
CONFIG = ServerConfig(
    context_length=128, max_total_tokens=8192, dtype="float32", mem_fraction_static=0.1
)


@dataclass(frozen=True)
class RunningServer:
    process: psutil.Popen
    url: str
    port: int
    keys: ServerKeys
    command: ServerCommand
    log: Path
    model: Path

    def processes(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


def make_model(directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(directory)
    return directory


@lru_cache(maxsize=4)
def _loaded(directory: Path) -> Any:
    return Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def reference_logprobs(directory: Path, ids: Sequence[int], temperature: float = 1.0) -> Any:
    """[len(ids) - 1, V]: row t is the distribution of token t + 1, by transformers."""
    model = _loaded(directory)
    with torch.no_grad():
        logits_TV = model(torch.tensor([list(ids)])).logits[0, :-1].double()
    return torch.log_softmax(logits_TV / temperature, dim=-1).numpy()


def of_ids(logprobs_TV: Any, ids: Sequence[int]) -> Any:
    return logprobs_TV[np.arange(len(ids)), list(ids)]


def probe_logprobs(directory: Path, probes: Sequence[Sequence[int]]) -> list[list[float]]:
    return [of_ids(reference_logprobs(directory, ids), ids[1:]).tolist() for ids in probes]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def launch(
    folder: Path,
    model: Path,
    *,
    keys: ServerKeys,
    port: int | None = None,
    weight_version: int = 7,
    more_arguments: Sequence[str] = (),
) -> RunningServer:
    """Start a server and return at once."""
    keys_file = folder / "keys.json"
    write_keys(keys_file, keys)
    port = port or free_port()
    command = server_command(
        CONFIG,
        device="cpu",
        model_path=model,
        port=port,
        keys_file=keys_file,
        seed=1,
        weight_version=weight_version,
        parent_pid=os.getpid(),
    )
    command = ServerCommand((*command.argv, *more_arguments), command.env)
    log = folder / f"server_{port}.log"
    with log.open("ab") as output:
        process = psutil.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return RunningServer(process, f"http://127.0.0.1:{port}", port, keys, command, log, model)


def wait_ready(server: RunningServer, deadline_s: float = 150.0) -> None:
    """Wait until it answers; fails with the end of its log when it ends instead."""

    def still_alive(waited_s: float, what: str) -> None:
        assert server.process.poll() is None, server.log.read_text()[-3000:]

    async def wait() -> None:
        async with SglangClient("tiny", server.url, server.keys, vocab_size=VOCAB) as client:
            await client.wait_ready(deadline_s, still_alive)

    asyncio.run(wait())


@contextmanager
def running(
    folder: Path, model: Path, count: int, **options: Any
) -> Iterator[tuple[RunningServer, ...]]:
    """Start servers together, wait for all, kill them at the end."""
    keys = options.pop("keys", None) or new_keys()
    servers = [launch(folder, model, keys=keys, **options) for _ in range(count)]
    try:
        for server in servers:
            wait_ready(server)
        yield tuple(servers)
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.kill()


def wait_gone(processes: Sequence[psutil.Process], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while alive := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
