"""From rows to encoded prompts, with the demo's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.config.schema import DataConfig
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.data.prompts import PromptSet, load_prompts
from opd_megatron.demo.tokenizer import save_tokenizer
from opd_megatron.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(directory, context_length=64)
    (directory / "config.json").write_text('{"vocab_size": 32, "eos_token_id": 3}')
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> ChatTokenizer:
    return load_chat_tokenizer(model_directory)


def load(path: Path, tokenizer: ChatTokenizer, *prompts: object, **config: object) -> PromptSet:
    path.write_text(
        "".join(
            json.dumps({"prompt": prompt, "id": str(i)}) + "\n" for i, prompt in enumerate(prompts)
        )
    )
    settings = {"max_bad_rows_frac": 1.0, **config}
    return load_prompts(path, DataConfig(**settings), ["main"], tokenizer)  # type: ignore[arg-type]


def test_text_and_messages_encode_alike(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    message = [{"role": "user", "content": "40+85:"}]
    prompts = load(tmp_path / "p.jsonl", tokenizer, "40+85:", message).prompts
    assert [prompt.token_ids for prompt in prompts] == [(2, 8, 4, 14, 12, 9, 18)] * 2
    assert [prompt.text for prompt in prompts] == ["40+85:"] * 2


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("40+85?", "not_encodable"),
        ("1\n2", "not_encodable"),
        ("<|im_start|>40+85:", "not_encodable"),
        ([{"role": "system", "content": "1"}, {"role": "user", "content": "1"}], "not_encodable"),
        ("1" * 10, "over_long"),
    ],
)
def test_row_the_tokenizer_cannot_use_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, prompt: object, reason: str
) -> None:
    result = load(tmp_path / "p.jsonl", tokenizer, "1", prompt, "1" * 9, max_prompt_tokens=10)
    assert result.rejected == {reason: 1}
    assert result.rejected_examples[0].startswith(f"p.jsonl:2: {reason}: ")
    assert [prompt.id for prompt in result.prompts] == ["0", "2"]


def test_budget_counts_both_passes_together(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = ["1", "2", "", "?"]
    assert load(tmp_path / "p.jsonl", tokenizer, *rows, max_bad_rows_frac=0.5).rejected == {
        "empty": 1,
        "not_encodable": 1,
    }
    with pytest.raises(DataError, match="2 of 4 rows"):
        load(tmp_path / "p.jsonl", tokenizer, *rows, max_bad_rows_frac=0.25)


def test_content_hash_changes_with_what_training_sees(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    one = load(tmp_path / "a.jsonl", tokenizer, "1", "2").content_hash
    assert load(tmp_path / "b.jsonl", tokenizer, "1", "2").content_hash == one
    assert load(tmp_path / "a.jsonl", tokenizer, "2", "1").content_hash != one
    assert load(tmp_path / "a.jsonl", tokenizer, "1", "2", "3").content_hash != one


def test_tokens_decode_for_display_and_responses_for_grading(tokenizer: ChatTokenizer) -> None:
    assert (tokenizer.decode_token(3), tokenizer.decode_token(4)) == ("<|im_end|>", "0")
    assert tokenizer.decode_response([4, 18, 3]) == "0:"
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (32, (3,))


def test_tokenizer_without_chat_template_is_refused(tmp_path: Path, model_directory: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model_directory / name).read_bytes())
    with pytest.raises(ConfigError, match="no chat template"):
        load_chat_tokenizer(tmp_path)
