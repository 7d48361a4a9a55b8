"""The task `add2`: add two two-digit numbers, one written step per column.

    prompt    40+85:
    response  0+5=5,8+4=12>125      (or 5+0=5,4+8=12>125, or ...)

Each step writes its two digits in random order. That free choice gives even a perfect model real
entropy (2 ln 2 nats a response), so that entropy, diversity and filters mean something. Of the 8100
prompts about one in eight is held out, by a hash of its text: training never sees them, in any
process, with any seed.

Left out on purpose: longer numbers. They need a larger teacher and show nothing that two digits do
not.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.atomic import write_bytes
from opd_megatron.eval.column_addition import column_steps, render_step

LOW, HIGH = 10, 99
HELD_OUT_ONE_IN = 8
MAX_RESPONSE_TOKENS = 20  # the longest, 9+9=18,9+9+1=19>198, has 19 characters; and the end token


@dataclass(frozen=True, slots=True)
class Example:
    """One demonstration, e.g. `Example("40+85:", "0+5=5,8+4=12>125", "125")`."""

    prompt: str
    response: str
    answer: str


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out split."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def all_prompts(held_out: bool) -> list[str]:
    """Every prompt of one split, in numeric order."""
    numbers = range(LOW, HIGH + 1)
    prompts = (f"{a}+{b}:" for a in numbers for b in numbers)
    return [prompt for prompt in prompts if is_held_out(prompt) == held_out]


def answer_of(prompt: str) -> str:
    a, b = prompt.removesuffix(":").split("+")
    return str(int(a) + int(b))


def write_derivation(prompt: str, rng: random.Random) -> Example:
    """A right response for `prompt`, with the operand order of each step drawn from `rng`."""
    a, b = (int(number) for number in prompt.removesuffix(":").split("+"))
    steps = []
    for x, y, carry, total in column_steps(a, b):
        if rng.random() < 0.5:
            x, y = y, x
        steps.append(render_step(x, y, carry, total))
    return Example(prompt, ",".join(steps) + f">{a + b}", str(a + b))


def write_rows(path: Path, prompts: list[str]) -> None:
    """Write prompts as JSONL rows `{"id", "prompt", "answer"}`; ids are prompts without colon."""
    rows = (
        {"id": f"add2-{prompt[:-1]}", "prompt": prompt, "answer": answer_of(prompt)}
        for prompt in prompts
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_bytes(path, text.encode())


def write_demonstrations(path: Path, num_rows: int, seed: int) -> None:
    """Write JSONL rows `{"id", "prompt", "response"}` for supervised training: right derivations of distinct training
    prompts.
    """
    rng = random.Random(seed)
    chosen = rng.sample(all_prompts(held_out=False), num_rows)
    rows = (
        {"id": f"add2-{d.prompt[:-1]}", "prompt": d.prompt, "response": d.response}
        for d in (write_derivation(prompt, rng) for prompt in chosen)
    )
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_dataset(directory: Path, num_train: int, num_heldout: int, seed: int) -> None:
    """Write `train.jsonl` and `heldout.jsonl`: distinct prompts, chosen and ordered by `seed`."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_rows(directory / "train.jsonl", rng.sample(all_prompts(held_out=False), num_train))
    write_rows(directory / "heldout.jsonl", rng.sample(all_prompts(held_out=True), num_heldout))
