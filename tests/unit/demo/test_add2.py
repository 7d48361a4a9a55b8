"""The task: its splits, its derivations and its shipped data."""

from __future__ import annotations

import json
import random
from pathlib import Path

from opd_megatron.demo.add2 import (
    HELD_OUT_ONE_IN,
    MAX_RESPONSE_TOKENS,
    all_prompts,
    is_held_out,
    write_dataset,
    write_demonstrations,
    write_derivation,
)
from opd_megatron.demo.make_models import DATA_SEED, NUM_DEMONSTRATIONS, NUM_HELDOUT, NUM_TRAIN

SHIPPED = Path(__file__).parents[3] / "recipes" / "demo"


def test_splits_are_disjoint_and_cover_all_prompts() -> None:
    train, heldout = set(all_prompts(False)), set(all_prompts(True))
    assert not train & heldout
    assert len(train) + len(heldout) == 90 * 90
    assert abs(len(heldout) * HELD_OUT_ONE_IN / 8100 - 1) < 0.1


def test_both_operand_orders_occur() -> None:
    rng = random.Random(0)
    responses = {write_derivation("47+85:", rng).response for _ in range(50)}
    assert responses == {
        f"{low}=12,{high}+1=13>132" for low in ("7+5", "5+7") for high in ("4+8", "8+4")
    }


def test_longest_response_fits_the_token_limit_exactly() -> None:
    rng = random.Random(0)
    prompts = all_prompts(False) + all_prompts(True)
    lengths = [len(write_derivation(prompt, rng).response) + 1 for prompt in prompts]
    assert max(lengths) == MAX_RESPONSE_TOKENS


def test_shipped_data_is_what_the_script_writes(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_TRAIN, NUM_HELDOUT, DATA_SEED)
    write_demonstrations(tmp_path / "demonstrations.jsonl", NUM_DEMONSTRATIONS, DATA_SEED)
    for name in ("train.jsonl", "heldout.jsonl", "demonstrations.jsonl"):
        assert (SHIPPED / name).read_bytes() == (tmp_path / name).read_bytes()


def test_shipped_prompts_are_distinct_and_on_their_side_of_the_split() -> None:
    for name, held_out, count in (("train", False, NUM_TRAIN), ("heldout", True, NUM_HELDOUT)):
        rows = [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").open()]
        assert len({row["prompt"] for row in rows}) == len(rows) == count
        assert all(is_held_out(row["prompt"]) == held_out for row in rows)
        assert all(eval(row["prompt"][:-1]) == int(row["answer"]) for row in rows[:200])
