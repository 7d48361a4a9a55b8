"""The models: the training code works, and the shipped models are what the demo needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from opd_megatron.demo.add2 import Example, all_prompts
from opd_megatron.demo.make_models import (
    TEACHER,
    accuracy,
    encode_examples,
    is_right,
    new_model,
    replace_digits,
    save_model,
    train,
)
from opd_megatron.demo.tokenizer import IM_END, PAD, encode_text

SHIPPED = Path(__file__).parents[3] / "recipes" / "demo"
MAX_SHIPPED_BYTES = 3 * 1024**2


def shipped_heldout() -> list[str]:
    return [json.loads(line)["prompt"] for line in (SHIPPED / "heldout.jsonl").open()][:96]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("student", 0.28, 0.40),
        ("teacher_early", 0.42, 0.57),
        ("teacher_middle", 0.55, 0.69),
        ("teacher_late", 0.69, 0.84),
        ("teacher", 0.95, 1.0),
    ],
)
def test_shipped_model_knows_the_task_and_samples_as_intended(
    name: str, low: float, high: float
) -> None:
    model = Qwen3ForCausalLM.from_pretrained(SHIPPED / name, dtype=torch.float32)
    assert accuracy(model, shipped_heldout(), 0, seed=0) >= 0.98
    assert low <= accuracy(model, shipped_heldout(), 8, seed=1) <= high


def test_shipped_files_are_small() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_SHIPPED_BYTES


def test_training_is_deterministic_and_lowers_the_loss(tmp_path: Path) -> None:
    short = replace(TEACHER, num_layers=1, num_steps=8, batch_size=16)
    models = [new_model(1, seed=3) for _ in range(2)]
    for model in models:
        train(model, short, all_prompts(held_out=False))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    before = new_model(1, seed=3)
    prompts_BP, responses_BL = encode_examples([Example("40+85:", "0+5=5,8+4=12>125", "125")])
    ids_BT = torch.cat([prompts_BP, responses_BL], dim=1)
    assert models[0](ids_BT, labels=ids_BT).loss < before(ids_BT, labels=ids_BT).loss


def test_saved_model_loads_with_the_same_weights(tmp_path: Path) -> None:
    model = new_model(1, seed=3)
    save_model(model, tmp_path)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert loaded.generation_config is not None
    assert loaded.generation_config.eos_token_id == IM_END
    for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_noise_replaces_digits_only() -> None:
    responses_BL = torch.tensor([encode_text("0+5=5,8+4=12>125"), [PAD] * 16]).repeat(200, 1)
    noisy_BL = replace_digits(responses_BL, 0.10, torch.Generator().manual_seed(0))
    is_digit = (responses_BL >= 4) & (responses_BL <= 13)
    assert torch.equal(noisy_BL[~is_digit], responses_BL[~is_digit])
    changed = (noisy_BL != responses_BL)[is_digit].float().mean().item()
    assert changed == pytest.approx(0.09, abs=0.02)  # one in ten draws gives the same digit


def test_verdict_needs_the_end_token_and_no_special_token_inside() -> None:
    right = encode_text("0+5=5,8+4=12>125")
    assert is_right("40+85:", [*right, IM_END, PAD])
    assert not is_right("40+85:", right)
    assert not is_right("40+85:", [PAD, *right, IM_END])
