"""`opd recipes list|show|diff|cp` and `opd validate --offline`, as a user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opd_megatron.cli.app import main
from opd_megatron.config.overrides import to_mapping
from opd_megatron.config.recipes import load_recipe
from opd_megatron.errors import EXIT_CONFIG

BF16 = "qwen3_4b_base_from_qwen3_32b_32gpu_gb200_bf16"
MXFP8 = "qwen3_4b_base_from_qwen3_32b_32gpu_gb200_mxfp8"


def opd(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main_code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        main_code = stop.code or 0
    captured = capsys.readouterr()
    assert main_code == 0, captured.err
    return captured.out


@pytest.mark.parametrize(
    ("options", "found", "left_out"),
    [
        (["--hardware", "cpu"], "demo_topk", BF16),
        (["--teacher-size", "32b", "--hardware", "GB200"], MXFP8, "qwen3_4b_base_from_qwen3_8b"),
        (["--student", "1.7b-base"], "qwen3_1_7b_base_from_qwen3_32b", BF16),
        (["--gpus", "16"], "qwen3_4b_base_from_qwen3_4b_16gpu", "32gpu"),
    ],
)
def test_filters_choose(
    capsys: pytest.CaptureFixture[str], options: list[str], found: str, left_out: str
) -> None:
    text = opd(capsys, "recipes", "list", *options)
    assert found in text and left_out not in text


def test_a_filter_that_nothing_fits_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["recipes", "list", "--hardware", "b300"])
    assert stop.value.code == EXIT_CONFIG
    assert "hardware: cpu, gb200, h100" in capsys.readouterr().err


def test_show_prints_yaml_with_derived_numbers_as_comments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = opd(capsys, "recipes", "show", BF16, "batch.prompts_per_step=64")
    assert "# 32 GPUs: learner 8, rollout 16, teacher-main 8" in text
    assert "# its file says, without these overrides:\n# Reproduces: " in text
    assert "# Memory: not run here; planned GiB of a GPU's 173: learner 36" in text
    assert "without these" not in opd(capsys, "recipes", "show", BF16)
    assert "= 256 samples a step" in text
    assert "# samples of at most 1024 + 8192 tokens, 9216 tokens a micro-batch" in text
    assert yaml.safe_load(text)["batch"]["prompts_per_step"] == 64


@pytest.mark.parametrize(
    ("docstring", "encoding", "shown"),
    [
        ('"""Mine: é.\n\nSource: é."""', "utf-8-sig", "# Source: é."),
        ('# -*- coding: latin-1 -*-\n"""Mine: é.\n\nSource: é."""', "latin-1", "# Source: é."),
        ('"""Mine: é."""', "utf-8", "# recipe mine: Mine: é."),
        ("", "utf-8", "# recipe mine: "),
    ],
)
def test_show_prints_what_a_file_of_ones_own_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, docstring: str, encoding: str, shown: str
) -> None:
    path = tmp_path / "mine.py"
    code = "from recipes.families.demo import addition as recipe\n"
    path.write_text(f"{docstring}\n{code}", encoding=encoding)
    assert shown.strip() in opd(capsys, "recipes", "show", str(path))


def test_diff_shows_only_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [line.split(":")[0] for line in opd(capsys, "recipes", "diff", BF16, MXFP8).splitlines()]
    assert keys == ["name", "summary", "learner.precision", "learner.fp8_recipe"]
    assert opd(capsys, "recipes", "diff", BF16, BF16) == ""


@pytest.mark.parametrize("name", ["demo_topk", BF16])
def test_a_copy_is_the_same_recipe_wherever_it_lies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    printed = opd(capsys, "recipes", "cp", name, str(tmp_path / "new" / "mine.py"))
    copied, original = load_recipe(printed.strip())[0], load_recipe(name)[0]
    assert to_mapping(copied) == {**to_mapping(original), "name": "mine"}


def test_a_copy_overwrites_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    opd(capsys, "recipes", "cp", "demo", str(tmp_path))
    for target, words in ((tmp_path, "exists already"), (tmp_path / "x", "a recipe is a .py file")):
        with pytest.raises(SystemExit):
            main(["recipes", "cp", "demo", str(target)])
        assert words in capsys.readouterr().err


def test_validate_offline_says_what_it_did_not_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("OPD_MODELS", raising=False)
    text = opd(capsys, "validate", BF16, "--offline")
    assert "not checked: tokenizer and weights of Qwen/Qwen3-32B" in text
    assert "valid, as far as it was checked" in text
    assert opd(capsys, "validate", "demo", "--offline").splitlines()[-1] == "valid"
    with pytest.raises(SystemExit):
        main(["validate", BF16])
    error = capsys.readouterr().err
    assert "student.path='Qwen/Qwen3-4B-Base'" in error and str(tmp_path) in error
