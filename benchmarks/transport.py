"""Measure what a teacher's answer costs: bytes and seconds a token, compact against nested, by K and length.

    python -m benchmarks.transport [--tokens 1024,4096,16384] [--topk 1,16,64,128] [--run RUN] [--quick]
                                   [--out FILE.json] [--write-docs]

A real SGLang server of a tiny model on CPU scores one response a request. Of every request: size of the body, wall time
until its last byte, and the time that our client needs to decode and check it (`serving/contract.py`). The same
response with K = 0 (the sampled tokens alone) is the prefill itself; what K adds to both times is its transport, but
for the choice of the K tokens on the server, which is timed alone: one `topk` on one core, as this server does it.
With `--run`, a finished run of the same machine, that is compared with the run's step time a token.

Left out: a network between the processes (loopback here), a GPU server, several requests at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import environment, transport_report
from benchmarks.report import write_between_markers
from opd_megatron.config.schema import ServerConfig
from opd_megatron.observe.jsonl import read_rows
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.command import server_command
from opd_megatron.serving.contract import read_scores
from opd_megatron.serving.keys import ServerKeys, new_keys, write_keys
from opd_megatron.serving.requests import score_body

VOCAB = 4096
DOCS_PAGE = environment.ROOT / "docs" / "transport.md"
RESULTS = environment.ROOT / "benchmarks" / "results"
_START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Request:
    """One kind of answer. `form`: "sampled" (K = 0), "base64", "nested" or "listed"."""

    form: str
    topk: int
    tokens: int


@dataclass(frozen=True)
class Timing:
    """Medians over repeats; `num_bytes` is the body of the answer, `select_s` the choice of K tokens alone."""

    num_bytes: int
    wall_s: float
    decode_s: float
    select_s: float = 0.0


def requests(tokens: Sequence[int], topk: Sequence[int]) -> list[Request]:
    """Everything that is measured, the plain prefill of each length first."""
    made: list[Request] = []
    for length in tokens:
        made.append(Request("sampled", 0, length))
        made += [Request(form, k, length) for k in topk for form in ("base64", "nested")]
        # A route's pieces are short; a long list of tokens at many positions is not asked for.
        made += [Request("listed", k, length) for k in topk if length == min(tokens)]
    return made


def write_model(directory: Path, context: int, hidden: int = 32, layers: int = 1) -> None:
    """A random Qwen3: what is measured does not depend on what it says."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(directory)


@contextmanager
def serving(
    folder: Path,
    context: int,
    *,
    max_total_tokens: int = 0,
    hidden: int = 32,
    layers: int = 1,
    more_arguments: Sequence[str] = (),
) -> Iterator[tuple[str, ServerKeys]]:
    """A server of its own on loopback, ended at the end: (base URL, keys)."""
    write_model(folder / "model", context, hidden, layers)
    keys = new_keys()
    write_keys(folder / "keys.json", keys)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = ServerConfig(
        context_length=context,
        max_total_tokens=max_total_tokens or 2 * context,
        dtype="float32",
        mem_fraction_static=0.1,
    )
    command = server_command(
        config,
        device="cpu",
        model_path=folder / "model",
        port=port,
        keys_file=folder / "keys.json",
        seed=0,
        parent_pid=os.getpid(),
    )
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command.argv, *more_arguments],
            env={**os.environ, **command.env},
            stdout=log,
            stderr=log,
        )
        try:
            yield f"http://127.0.0.1:{port}", keys
        finally:
            process.terminate()
            process.wait(30)


async def measure(url: str, keys: ServerKeys, wanted: Request, repeats: int) -> Timing:
    """Ask `repeats` times, each response another one, so that nothing comes from the prefix cache.

    Raises:
        ContractError: an answer that the client would refuse.
    """
    seen: list[tuple[int, float, float]] = []
    generator = np.random.default_rng([wanted.tokens, wanted.topk])
    headers = {"Authorization": f"Bearer {keys.api}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for repeat in range(repeats):
            ids = [int(i) for i in generator.integers(2, VOCAB, wanted.tokens + 1)]
            sequences = [((ids[0],), tuple(ids[1:]))]
            listed = [tuple(range(2, 2 + wanted.topk))] if wanted.form == "listed" else None
            topk = 0 if listed else wanted.topk
            rids = [f"{wanted.form}-{wanted.topk}-{wanted.tokens}-{repeat}"]
            body = score_body(sequences, rids, topk, listed, compact=wanted.form != "nested")
            begin = time.perf_counter()
            async with session.post(f"{url}/generate", data=orjson.dumps(body)) as answer:
                raw = await answer.read()
                assert answer.status == 200, raw[:200]
            received = time.perf_counter()
            (score,) = read_scores(
                orjson.loads(raw),
                sent_as=rids,
                sequences=sequences,
                vocab_size=VOCAB,
                topk=topk,
                listed=listed,
            )
            seen.append((len(raw), received - begin, time.perf_counter() - received))
            assert len(score.logprobs) == wanted.tokens
    sizes, walls, decodes = zip(*seen, strict=True)
    return Timing(
        int(statistics.median(sizes)), statistics.median(walls), statistics.median(decodes)
    )


def selection_s(tokens: int, topk: int, repeats: int) -> float:
    """Seconds to choose the K likeliest of the vocabulary at so many positions, on one core; the server's own work."""
    logprobs_TV = torch.randn(tokens, VOCAB, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    seconds: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        logprobs_TV.topk(topk, dim=1)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


async def measure_all(
    url: str, keys: ServerKeys, wanted: Sequence[Request], repeats: int
) -> dict[Request, Timing]:
    async with SglangClient("teacher-0", url, keys, vocab_size=VOCAB) as client:
        await client.wait_ready(_START_TIMEOUT_S)
    await measure(url, keys, wanted[0], 1)
    found: dict[Request, Timing] = {}
    for number, one in enumerate(wanted, start=1):
        timing = await measure(url, keys, one, repeats)
        if one.form in ("base64", "nested"):
            timing = replace(timing, select_s=selection_s(one.tokens, one.topk, repeats))
        found[one] = timing
        print(f"[{number}/{len(wanted)}] {one} {found[one]}", file=sys.stderr, flush=True)
    return found


def step_of(run: Path) -> dict[str, Any]:
    """Medians over the training steps of a finished run: seconds a response token, and the share of scoring."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get("perf/step_s")]
    if not rows:
        raise SystemExit(f"--run {run}: no training step is recorded there")
    return {
        "steps": len(rows),
        "step_s": statistics.median(row["perf/step_s"] for row in rows),
        "step_s_per_token": statistics.median(
            row["perf/step_s"] / row["train/tokens"] for row in rows
        ),
        "teacher_frac": statistics.median(
            row.get("perf/teacher_s", 0.0) / row["perf/step_s"] for row in rows
        ),
    }


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tokens", type=_numbers, default=[1024, 4096, 16384])
    parser.add_argument("--topk", type=_numbers, default=[1, 16, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a finished run of this machine to compare with")
    parser.add_argument("--quick", action="store_true", help="one short length: does it run?")
    parser.add_argument("--out", type=Path, help="write the record there as JSON")
    parser.add_argument("--write-docs", action="store_true", help="publish: docs and results")
    args = parser.parse_args(arguments)
    tokens, repeats = ([256], 1) if args.quick else (args.tokens, args.repeats)
    if max(args.topk) > VOCAB:
        raise SystemExit(f"--topk {max(args.topk)}: the model has {VOCAB} tokens")
    facts = environment.describe("cpu")
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), max(tokens) + 64) as server:
        found = asyncio.run(measure_all(*server, requests(tokens, args.topk), repeats))
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.transport", *map(str, arguments)]),
        "environment": facts,
        "vocab_size": VOCAB,
        "repeats": repeats,
        "run": step_of(args.run) if args.run else None,
        "results": [{**asdict(one), **asdict(timing)} for one, timing in found.items()],
    }
    text = transport_report.render(record)
    print(text)
    for path in [args.out] if args.out else []:
        path.write_text(json.dumps(record, indent=1) + "\n")
    if args.write_docs and args.quick:
        print("not published: --quick leaves something out", file=sys.stderr)
    elif args.write_docs:
        (RESULTS / "transport-cpu.json").write_text(json.dumps(record, indent=1) + "\n")
        write_between_markers(DOCS_PAGE, "transport cpu", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
