"""Measure how often a server computes the prompt that a group shares, and what telling it first would win.

    python -m benchmarks.prefix [--repeats 3] [--write-docs]

A real SGLang server of a tiny model on CPU is asked for a group of eight sequences with one prompt, each time another
one. `scores`: their top-16 log-probs; `tokens`: eight new tokens each. Asked in one request (`together`), after a
request for the prompt alone (`prompt first`), and, for scores, after the first of them (`one first`). `cached` is what
the server says that it took from its cache, of the prompt tokens that eight readings of one prompt repeat.

The servers differ in two arguments: `--schedule-policy` (SGLang's default is fcfs; lpm puts requests behind one that
shares their prefix) and `--chunked-prefill-size`, which bounds the tokens of one prefill.

Left out: a GPU; other requests at the same time, which fill the wait for the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson

from benchmarks import environment
from benchmarks.report import table, write_between_markers
from benchmarks.transport import VOCAB, serving
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.keys import ServerKeys
from opd_megatron.serving.requests import score_body

DOCS_PAGE = environment.ROOT / "docs" / "transport.md"
RECORD = environment.ROOT / "benchmarks" / "results" / "prefix-cpu.json"
GROUP, TOPK, NEW_TOKENS = 8, 16, 8
CONTEXT = 4608
SERVERS: dict[str, tuple[str, ...]] = {
    "fcfs": (),
    "lpm": ("--schedule-policy", "lpm"),
    "fcfs, prefills of 2,048": ("--chunked-prefill-size", "2048"),
}
# (prompt tokens, response tokens), every one of a kind: short prompt, as long as the response, long prompt.
LENGTHS = ((128, 1024), (512, 512), (1024, 128), (2048, 128), (4096, 128))
ORDERS = {
    "scores": ("together", "prompt first", "one first"),
    "tokens": ("together", "prompt first"),
}


@dataclass(frozen=True)
class Found:
    """One way to ask. `cached_frac`: of the prompt tokens that all but one of the group could take from the cache."""

    server: str
    asked: str
    order: str
    prompt: int
    response: int
    wall_s: float
    cached_frac: float


class Asker:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url, self._number = session, url, 0

    def names(self, count: int) -> list[str]:
        self._number += count
        return [f"prefix-{self._number}-{k}" for k in range(count)]

    async def cached(self, body: dict[str, Any]) -> int:
        """Send it; tokens taken from the cache, all sequences together."""
        async with self._session.post(f"{self._url}/generate", data=orjson.dumps(body)) as answer:
            raw = await answer.read()
            assert answer.status == 200, raw[:300]
        items = orjson.loads(raw)
        return sum(item["meta_info"]["cached_tokens"] for item in items)

    async def scores(self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
        return await self.cached(score_body(sequences, self.names(len(sequences)), TOPK))

    async def tokens(self, prompts: Sequence[tuple[int, ...]], new: int) -> int:
        sampling = {"temperature": 1.0, "max_new_tokens": new, "ignore_eos": True}
        body = {"input_ids": [list(p) for p in prompts], "sampling_params": sampling}
        return await self.cached(body | {"return_logprob": True, "rid": self.names(len(prompts))})


async def ask(asker: Asker, asked: str, order: str, prompt: int, response: int, seed: int) -> int:
    """A group of its own; returns the tokens taken from the cache."""
    ids = np.random.default_rng([prompt, response, seed]).integers(2, VOCAB, (GROUP + 1, CONTEXT))
    shared = tuple(ids[0, :prompt].tolist())
    if asked == "tokens":
        if order == "prompt first":
            await asker.tokens([shared], 0)
        return await asker.tokens([shared] * GROUP, NEW_TOKENS)
    sequences = [(shared, tuple(row[:response].tolist())) for row in ids[1:]]
    if order == "one first":
        return await asker.scores(sequences[:1]) + await asker.scores(sequences[1:])
    if order == "prompt first":
        await asker.tokens([shared], 0)
    return await asker.scores(sequences)


async def measure(url: str, keys: ServerKeys, server: str, repeats: int) -> list[Found]:
    async with SglangClient("server", url, keys, vocab_size=VOCAB) as client:
        await client.wait_ready(180.0)
    headers = {"Authorization": f"Bearer {keys.api}", "Content-Type": "application/json"}
    found: list[Found] = []
    async with aiohttp.ClientSession(headers=headers) as session:
        asker = Asker(session, url)
        await ask(asker, "scores", "together", 64, 64, 0)
        for prompt, response in LENGTHS:
            for asked, orders in ORDERS.items():
                seconds: dict[str, list[float]] = {order: [] for order in orders}
                shares: dict[str, list[float]] = {order: [] for order in orders}
                for repeat in range(repeats):
                    # Orders take turns, so that what slows the machine slows them all.
                    for place, order in enumerate(orders):
                        seed = 100 * list(ORDERS).index(asked) + 10 * repeat + place
                        begin = time.perf_counter()
                        cached = await ask(asker, asked, order, prompt, response, seed)
                        seconds[order].append(time.perf_counter() - begin)
                        # Sent alone first, the prompt is in the cache for all eight.
                        possible = GROUP - (order != "prompt first")
                        shares[order].append(cached / (possible * (prompt - 1)))
                for order in orders:
                    wall, share = map(statistics.median, (seconds[order], shares[order]))
                    found.append(Found(server, asked, order, prompt, response, wall, share))
                    print(found[-1], file=sys.stderr, flush=True)
    return found


def to_markdown(record: dict[str, Any]) -> str:
    machine = record["environment"]
    head = [
        f"- {machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}; commit {machine['commit']}, "
        f"{machine['date']}, load average at the start {machine['load_average_at_start']}",
        f"- medians of {record['repeats']}; a group of {GROUP}; V = {VOCAB:,}, 4 layers of 256; `cached` in brackets",
        "",
    ]
    found = [Found(**row) for row in record["found"]]
    rows: list[list[str]] = []
    for first in (one for one in found if one.order == "together"):
        same = {
            one.order: f"{one.wall_s:.3f} ({one.cached_frac:.0%})"
            for one in found
            if (one.server, one.asked, one.prompt, one.response)
            == (first.server, first.asked, first.prompt, first.response)
        }
        response = f"{first.response:,}" if first.asked == "scores" else f"{NEW_TOKENS} new"
        cells = [same.get(order, "-") for order in ORDERS["scores"]]
        rows.append([first.server, first.asked, f"{first.prompt:,}", response, *cells])
    columns = ["server", "asked for", "prompt tokens", "response tokens"]
    return "\n".join([*head, *table([*columns, *(f"{o}, s" for o in ORDERS["scores"])], rows)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write-docs", action="store_true", help="publish record and table")
    args = parser.parse_args()
    record: dict[str, Any] = {"environment": environment.describe("cpu"), "repeats": args.repeats}
    found: list[Found] = []
    for name, more in SERVERS.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(
                Path(folder),
                CONTEXT,
                max_total_tokens=20 * CONTEXT,
                hidden=256,
                layers=4,
                more_arguments=more,
            ) as server,
        ):
            found += asyncio.run(measure(*server, name, args.repeats))
    record["found"] = [asdict(one) for one in found]
    text = to_markdown(record)
    print(text)
    if args.write_docs:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        write_between_markers(DOCS_PAGE, "prefix cpu", text)


if __name__ == "__main__":
    main()
