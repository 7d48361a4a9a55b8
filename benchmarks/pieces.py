"""Measure how long the pieces should be in which a served teacher scores tokens that somebody else chose.

    python -m benchmarks.pieces [--tokens 1024] [--wanted 16] [--pieces 1,2,4,8,16,32,64]

A real SGLang server of a tiny model on CPU has scored a response; then it is asked for `wanted` random tokens at every
position, `teacher/asking.py` with one length of pieces after the other. A short piece is one more request, a long one
sends entries that nobody asked for. The table is in docs/decisions/0022-routes-for-other-tokens.md.

Left out: a GPU server, other requests meanwhile, lists of neighbours that overlap as real ones do.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.transport import VOCAB, serving
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.keys import ServerKeys
from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.asking import ask_listed
from opd_megatron.types import Rollout

PROMPT_TOKENS = 64


async def measure(
    url: str, keys: ServerKeys, tokens: int, wanted: int, pieces: Sequence[int]
) -> dict[int, float]:
    """Seconds of the second request for a response, by the length of its pieces."""
    generator = np.random.default_rng(0)
    found: dict[int, float] = {}
    async with SglangClient("teacher-0", url, keys, vocab_size=VOCAB) as client:
        await client.wait_ready(180.0)
        pool = ServerPool("teacher", [client], return_timeout_s=5.0, say=print)
        pool.admit(client, 0)
        for piece in pieces:
            ids = tuple(int(i) for i in generator.integers(2, VOCAB, PROMPT_TOKENS + tokens))
            prompt, response = ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:]
            nothing = np.zeros(tokens, np.float32)
            rollout = Rollout("p#0", "p", prompt, response, nothing, "stop", 0, 0, client.name)
            lists = np.stack(
                [generator.permutation(np.arange(2, VOCAB))[:wanted] for _ in range(tokens)]
            )
            await pool.score([(prompt, response)], wanted)
            begin = time.perf_counter()
            await ask_listed(pool, [rollout], [lists], TokenAliases(), piece, [client.name])
            found[piece] = time.perf_counter() - begin
        await pool.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--wanted", type=int, default=16)
    parser.add_argument("--pieces", default="1,2,4,8,16,32,64")
    args = parser.parse_args()
    pieces = [int(part) for part in args.pieces.split(",")]
    room = PROMPT_TOKENS + args.tokens + 64
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), room, max_total_tokens=16 * room, hidden=64, layers=3) as server,
    ):
        found = asyncio.run(measure(*server, args.tokens, args.wanted, pieces))
    for piece, seconds in found.items():
        print(f"{piece} positions a request: {1e6 * seconds / args.tokens:.0f} us a token")


if __name__ == "__main__":
    main()
