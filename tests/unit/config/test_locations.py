"""A model's name and a prompt file's path are found where the environment says, and an error names every place."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.config.locations import how_to_get_model, is_model_name, locate
from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe

NAME = "Qwen/Qwen3-4B-Base"


def _recipe(**paths: str) -> Recipe:
    keys = {"student": "student.path", "teacher": "teachers.main.path", "train": "data.train"}
    return change(Recipe(), {keys[key]: value for key, value in paths.items()})


@pytest.mark.parametrize("folder", [NAME, "Qwen3-4B-Base"])
def test_a_model_is_found_below_every_root_with_or_without_its_organisation(
    tmp_path: Path, folder: str
) -> None:
    (tmp_path / "b" / folder).mkdir(parents=True)
    environment = {"OPD_MODELS": f"{tmp_path / 'a'}:{tmp_path / 'b'}", "HF_HOME": str(tmp_path)}
    found = locate(_recipe(student=NAME, teacher=NAME), environment)
    assert found.student.path == found.teachers["main"].path == str(tmp_path / "b" / folder)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_model_is_found_in_the_hugging_face_cache(tmp_path: Path, variable: str) -> None:
    below = {"HF_HUB_CACHE": ".", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    entry = tmp_path / below / "models--Qwen--Qwen3-4B-Base"
    (entry / "snapshots" / "abc").mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc\n")
    found = locate(_recipe(student=NAME), {variable: str(tmp_path)})
    assert Path(found.student.path) == entry / "snapshots" / "abc"


def test_the_models_folder_wins_over_the_cache(tmp_path: Path) -> None:
    (tmp_path / "mine" / "Qwen3-4B-Base").mkdir(parents=True)
    (tmp_path / "hub" / "models--Qwen--Qwen3-4B-Base" / "snapshots" / "main").mkdir(parents=True)
    environment = {"OPD_MODELS": str(tmp_path / "mine"), "HF_HOME": str(tmp_path)}
    found = locate(_recipe(student=NAME), environment).student.path
    assert found == str(tmp_path / "mine" / "Qwen3-4B-Base")


def test_prompts_are_found_below_a_data_folder(tmp_path: Path) -> None:
    (tmp_path / "deepmath").mkdir()
    (tmp_path / "deepmath" / "train.jsonl").touch()
    found = locate(_recipe(train="deepmath/train.jsonl"), {"OPD_DATA": str(tmp_path)})
    assert found.data.train == str(tmp_path / "deepmath" / "train.jsonl")


def test_what_is_nowhere_stays_as_it_was_written(tmp_path: Path) -> None:
    recipe = _recipe(student=NAME, teacher="/no/such", train="no.jsonl")
    assert locate(recipe, {"HF_HOME": str(tmp_path), "OPD_DATA": str(tmp_path)}) == recipe


def test_a_missing_model_is_explained_with_every_place(tmp_path: Path) -> None:
    rule, fix = how_to_get_model(NAME, {"OPD_MODELS": "/a:/b", "HF_HUB_CACHE": "/c"})
    for place in ("/a/Qwen/Qwen3-4B-Base", "/b/Qwen3-4B-Base", "/c/models--Qwen--Qwen3-4B-Base"):
        assert place in rule
    assert f"hf download {NAME}" in fix and "OPD_MODELS" in fix
    rule, _ = how_to_get_model("my-model", {})
    assert "nowhere; OPD_MODELS is not set" in rule


@pytest.mark.parametrize(
    ("text", "is_name"),
    [(NAME, True), ("mine", True), ("a/b/c", False), ("/abs", False), ("../x", False), ("", False)],
)
def test_paths_are_not_names(text: str, is_name: bool) -> None:
    assert is_model_name(text) is is_name
