"""Record answers of a real server for the unit tests of the response contract.

python tests/real/record_answers.py tests/unit/serving/recorded_answers.json
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import sglang
from tiny_servers import VOCAB, RunningServer, make_model, running

PAIRS = (((3, 4, 5, 6), (11, 12, 13)), ((7, 8), (14, VOCAB - 1, 16, 17)))
_STOPS = list(range(2, 18, 2))
_SAMPLING = {"temperature": 1.0, "max_new_tokens": 6, "stop_token_ids": _STOPS}


def _score(topk: int, is_flat: bool, rids: list[str]) -> dict[str, Any]:
    return {
        "input_ids": [[*prompt, *response] for prompt, response in PAIRS],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [len(prompt) - 1 for prompt, _ in PAIRS],
        "top_logprobs_num": topk,
        "return_flat_raw_top_logprobs": is_flat,
        "return_flat_raw_top_logprobs_b64": is_flat,
        "rid": rids,
    }


REQUESTS: dict[str, dict[str, Any]] = {
    "generate": {
        "input_ids": [[3, 4, 5, 6], [7, 8], [3, 4, 5, 6]],
        "sampling_params": _SAMPLING,
        "return_logprob": True,
        "rid": ["g0/0", "g1/0", "g2/0"],
    },
    "generate_topk": {
        "input_ids": [[3, 4, 5, 6], [7, 8]],
        "sampling_params": _SAMPLING,
        "return_logprob": True,
        "top_logprobs_num": 4,
        "return_flat_raw_output_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
        "rid": ["k0/0", "k1/0"],
    },
    "score": _score(0, False, ["s0/0", "s1/0"]),
    "score_flat": _score(4, True, ["t0/0", "t1/0"]),
    "score_nested": _score(4, False, ["n0/0", "n1/0"]),
    "score_listed": _score(0, False, ["l0/0", "l1/0"])
    | {"token_ids_logprob": [[20, 3, VOCAB - 1], [9, 40]]},
    "refused": {"input_ids": [[3]], "sampling_params": {"temperature": -1.0}},
}


async def record(server: RunningServer) -> dict[str, Any]:
    """Status and body of each request, by name."""
    headers = {"Authorization": f"Bearer {server.keys.api}", "Content-Type": "application/json"}
    answers: dict[str, Any] = {}
    async with aiohttp.ClientSession(headers=headers) as session:
        for name, request in REQUESTS.items():
            async with session.post(
                f"{server.url}/generate", data=orjson.dumps(request)
            ) as response:
                answers[name] = {
                    "status": response.status,
                    "request": request,
                    "answer": orjson.loads(await response.read()),
                }
    return answers


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", 0)
        with running(Path(folder), model, 1) as (server,):
            answers = asyncio.run(record(server))
    content = {"sglang": sglang.__version__, "vocab_size": VOCAB, "answers": answers}
    Path(sys.argv[1]).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    main()
