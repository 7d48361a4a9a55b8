"""A commit knows the run it belongs to: recipe, data and tokenizer by content; each change is refused under its key."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.config.resume import may_change, refuse_other_run
from opd_megatron.config.schema import Recipe
from opd_megatron.controller import commit
from opd_megatron.controller.main import load_inputs
from opd_megatron.errors import CheckpointError, ConfigError


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The demo on copies of its files."""
    stock, _ = resolve_recipe("demo", [])
    student = Path(shutil.copytree(stock.student.path, tmp_path / "student"))
    train = Path(shutil.copy(stock.data.train, tmp_path / "train.jsonl"))
    return dataclasses.replace(
        stock,
        student=dataclasses.replace(stock.student, path=str(student)),
        data=dataclasses.replace(stock.data, train=str(train), heldout=""),
    )


def resume(root: Path, recipe: Recipe) -> None:
    """What the controller does with the newest commit."""
    found = commit.newest(root, lambda _: None)
    assert found is not None
    marks = load_inputs(recipe).fingerprint
    commit.refuse_changes(found, marks, may_change(set(marks) | set(found.fingerprint)))


@pytest.fixture
def root(tmp_path: Path, recipe: Recipe) -> Path:
    """Checkpoints of a run with one commit."""
    root = tmp_path / "checkpoints"
    commit.begin(root, 1)
    commit.finish(root, 1, {"step": 1}, load_inputs(recipe).fingerprint, keep=2)
    return root


def test_the_same_run_goes_on_also_from_other_places_and_in_another_layout(
    root: Path, recipe: Recipe, tmp_path: Path
) -> None:
    resume(root, recipe)
    train = Path(recipe.data.train).rename(tmp_path / "moved.jsonl")
    moved = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, train=str(train)),
        learner=dataclasses.replace(
            recipe.learner, tensor_parallel=1, data_parallel=2, distributed_optimizer=True
        ),
        checkpoint=dataclasses.replace(recipe.checkpoint, async_save=True),
        steps=recipe.steps + 1,
    )
    resume(root, moved)


def test_one_changed_prompt_is_refused(root: Path, recipe: Recipe) -> None:
    path = Path(recipe.data.train)
    first, *others = path.read_text().splitlines()
    row: dict[str, Any] = json.loads(first)
    text = json.dumps(row).replace("1", "2", 1)
    assert text != json.dumps(row)
    path.write_text("\n".join([text, *others]) + "\n")
    with pytest.raises(CheckpointError, match=r"data\.train \(content\): '\w+' -> '\w+'"):
        resume(root, recipe)


def test_a_tokenizer_with_two_tokens_swapped_is_refused(root: Path, recipe: Recipe) -> None:
    path = Path(recipe.student.path) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["7"], vocab["4"] = vocab["4"], vocab["7"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"student tokenizer \(content\): '\w+' -> '\w+'"):
        resume(root, recipe)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "lr", 1e-4),
        ("learner", "precision", "bf16"),
        ("batch", "prompts_per_step", 8),
        ("objective", "divergence", "forward_kl"),
    ],
)
def test_a_changed_setting_is_refused_by_its_key_from_the_commit_and_from_overrides(
    root: Path, recipe: Recipe, section: str, key: str, value: object
) -> None:
    old = getattr(getattr(recipe, section), key)
    changed = dataclasses.replace(
        recipe, **{section: dataclasses.replace(getattr(recipe, section), **{key: value})}
    )
    with pytest.raises(CheckpointError) as refused:
        resume(root, changed)
    assert f"{section}.{key}: {old!r} -> {value!r}" in str(refused.value)
    with pytest.raises(ConfigError) as refused_override:
        refuse_other_run(recipe, changed)
    assert str(refused_override.value).startswith(
        f"{section}.{key}={value!r}: this run was started"
    )
