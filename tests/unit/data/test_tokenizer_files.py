"""Comparing tokenizers from their files, without torch or transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opd_megatron.data.tokenizer_files import compare_tokenizers, tokenizer_fingerprint
from opd_megatron.demo.tokenizer import save_tokenizer
from opd_megatron.errors import ConfigError


def make(directory: Path, vocab_size: int = 32, eos: object = 3) -> Path:
    save_tokenizer(directory, context_length=64)
    config = {"vocab_size": vocab_size, "eos_token_id": eos}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def swap_tokens(directory: Path, first: str, second: str) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(tokenizer))


def test_equal_tokenizers_pass(tmp_path: Path) -> None:
    student, teacher = make(tmp_path / "s"), make(tmp_path / "t")
    compare_tokenizers(student, teacher)
    assert tokenizer_fingerprint(student).digest == tokenizer_fingerprint(teacher).digest


def test_first_differing_id_is_named(tmp_path: Path) -> None:
    student, teacher = make(tmp_path / "s"), make(tmp_path / "t")
    swap_tokens(teacher, "7", "4")
    with pytest.raises(
        ConfigError, match=r"teachers.math.path=.*id 8 is '4' .* and '7' for the te"
    ):
        compare_tokenizers(student, teacher, "math")


def test_different_vocabulary_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size is 32 for the student and 64 for the teacher"):
        compare_tokenizers(make(tmp_path / "s"), make(tmp_path / "t", vocab_size=64))


def test_different_end_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 '<\|endoftext\|>', 3 '<\|im_end\|>' for the teacher"):
        compare_tokenizers(make(tmp_path / "s"), make(tmp_path / "t", eos=[3, 1]))


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    directory = make(tmp_path / "m")
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert tokenizer_fingerprint(directory).eos_ids == (1, 3)


def test_older_layout_reads_like_the_newer_one(tmp_path: Path) -> None:
    directory = make(tmp_path / "m")
    newer = tokenizer_fingerprint(directory)
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    (directory / "tokenizer.json").unlink()
    added = {token: vocab.pop(token) for token in ("<|im_start|>", "<|im_end|>")}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "added_tokens.json").write_text(json.dumps(added))
    assert tokenizer_fingerprint(directory) == newer


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        ("rm config.json", "no config.json"),
        ("rm tokenizer.json", "no tokenizer"),
        ("echo { > tokenizer.json", "not JSON"),
        ("echo '[]' > config.json", "not a JSON object"),
        ("""echo '{"vocab_size": 31, "eos_token_id": 3}' > config.json""", "ids up to 31"),
        ("""echo '{"vocab_size": 32}' > config.json; rm tokenizer_config.json""", "no end token"),
    ],
)
def test_broken_model_directory_is_a_config_error(tmp_path: Path, spoil: str, rule: str) -> None:
    directory = make(tmp_path / "m")
    subprocess.run(spoil, shell=True, cwd=directory, check=True)
    with pytest.raises(ConfigError, match=rule):
        tokenizer_fingerprint(directory)


def test_validation_path_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, opd_megatron.data.rows, opd_megatron.data.prompts, opd_megatron.data.order;"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    # numpy comes with opd_megatron.types and is light.
    assert result.stdout.strip() in ("[]", "['numpy']")
