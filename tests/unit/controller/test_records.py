"""What the controller writes about the prompt files."""

from __future__ import annotations

from pathlib import Path

from opd_megatron.controller.records import account_for_inputs, input_lines
from opd_megatron.data.prompts import PromptSet
from opd_megatron.types import Prompt


def prompt_set(name: str, used: int, **rejected: int) -> PromptSet:
    prompts = tuple(Prompt(f"p{i}", (1,), "x", None, None, f"{name}:{i}") for i in range(used))
    examples = tuple(f"{name}:9: {reason}: words" for reason in rejected)
    return PromptSet(prompts, rejected, examples, "hash", Path(name))


def test_every_row_of_every_file_is_accounted_for() -> None:
    train = prompt_set("train.jsonl", 5, broken_json=2, over_long=1)
    inputs = account_for_inputs(train, prompt_set("heldout.jsonl", 3))
    assert inputs["data.train"]["rows"] == 8 and inputs["data.train"]["used"] == 5
    assert inputs["data.train"]["examples"][0] == "train.jsonl:9: broken_json: words"
    assert input_lines(inputs) == [
        "data.train: 5 of 8 rows used; rejected: broken_json 2, over_long 1 (see inputs.json)",
        "data.heldout: 3 of 3 rows used",
    ]


def test_a_run_without_held_out_prompts_has_one_file() -> None:
    assert list(account_for_inputs(prompt_set("train.jsonl", 1), None)) == ["data.train"]
