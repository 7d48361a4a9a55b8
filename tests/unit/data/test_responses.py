"""Rows for supervised training: where the response may stand, what is refused, and which ids train."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from opd_megatron.config.schema import DataConfig
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.data.prompts import PromptSet, load_prompts
from opd_megatron.demo.tokenizer import IM_END, encode_prompt, encode_text, save_tokenizer
from opd_megatron.errors import DataError

USER = {"role": "user", "content": "1+1:"}
ASSISTANT = {"role": "assistant", "content": "1+1=2>2"}
WANTED = (*encode_text("1+1=2>2"), IM_END)
GOOD = {"prompt": "1+1:", "response": "1+1=2>2"}


def save_model(directory: Path, template: str | None = None) -> ChatTokenizer:
    save_tokenizer(directory, context_length=64)
    (directory / "config.json").write_text('{"vocab_size": 32, "eos_token_id": 3}')
    if template is not None:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return load_chat_tokenizer(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return save_model(tmp_path_factory.mktemp("model"))


def load(path: Path, tokenizer: ChatTokenizer, *rows: object, **config: object) -> PromptSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_bad_rows_frac": 1.0, **config}
    data = DataConfig(**settings)  # type: ignore[arg-type]
    return load_prompts(path, data, [], tokenizer, max_response_tokens=8)


@pytest.mark.parametrize(
    ("row", "config"),
    [
        (GOOD, {}),
        ({"prompt": [USER], "response": "1+1=2>2"}, {}),
        ({"prompt": [USER], "response": [ASSISTANT]}, {}),
        ({"prompt": [USER, ASSISTANT]}, {}),
        ({"messages": [USER, ASSISTANT]}, {"prompt_key": "messages", "response_key": "messages"}),
        (
            {"question": "1+1:", "solution": "1+1=2>2"},
            {"prompt_key": "question", "response_key": "solution"},
        ),
        ({**GOOD, "teacher": "not of this run"}, {}),
    ],
)
def test_a_response_is_read_wherever_it_may_stand_and_ends_with_the_end_token(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, object], config: dict[str, object]
) -> None:
    (prompt,) = load(tmp_path / "p.jsonl", tokenizer, row, **config).prompts
    assert prompt.token_ids == tuple(encode_prompt("1+1:"))
    assert prompt.response_ids == WANTED
    assert prompt.text == "1+1:"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "1+1:"}, "missing_key"),
        ({"prompt": [USER]}, "missing_key"),
        ({"prompt": "1+1:", "response": None}, "missing_key"),
        ({"prompt": "1+1:", "response": " "}, "empty"),
        ({"prompt": "1+1:", "response": 2}, "wrong_type"),
        ({"prompt": "1+1:", "response": []}, "wrong_type"),
        ({"prompt": "1+1:", "response": [USER]}, "wrong_type"),
        ({"prompt": "1+1:", "response": [{**ASSISTANT, "content": ""}]}, "empty"),
        ({"prompt": [USER, ASSISTANT], "response": "2"}, "wrong_type"),
        ({"prompt": [ASSISTANT]}, "empty"),
        ({"prompt": "1+1:", "response": "1\n"}, "not_encodable"),
        ({"prompt": "1+1:", "response": "2<|im_end|>"}, "not_encodable"),
        ({"prompt": "1+1:", "response": "1+1=2>22"}, "over_long"),
    ],
)
def test_a_bad_response_is_refused_with_line_and_reason(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, object], reason: str
) -> None:
    result = load(tmp_path / "p.jsonl", tokenizer, GOOD, row, GOOD)
    assert result.rejected == {reason: 1}
    assert result.rejected_examples[0].startswith(f"p.jsonl:2: {reason}: ")
    assert len(result) == 2


def test_too_many_bad_responses_end_the_run_before_it_starts(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    with pytest.raises(DataError, match=r"p.jsonl:2: missing_key: no 'response'"):
        load(tmp_path / "p.jsonl", tokenizer, GOOD, {"prompt": "1"}, max_bad_rows_frac=0.1)


def test_the_content_hash_covers_responses(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    one = load(tmp_path / "p.jsonl", tokenizer, GOOD).content_hash
    assert load(tmp_path / "p.jsonl", tokenizer, {**GOOD, "response": "2"}).content_hash != one


def test_responses_are_read_from_parquet(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "p.parquet"
    messages = pa.array([[USER, ASSISTANT]])
    parquet.write_table(pa.table({"messages": messages}), path)
    data = DataConfig(prompt_key="messages", response_key="messages")
    (prompt,) = load_prompts(path, data, [], tokenizer, max_response_tokens=8).prompts
    assert prompt.response_ids == WANTED


_TURN = (
    "{%- for m in messages -%}{{ (m['role'] == 'user' and '<|im_start|>' or '') + m['content'] + "
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        # A template that ends a turn with a token at which no server would stop.
        (
            _TURN + "(m['role'] == 'assistant' and '<|endoftext|>' or '') }}{%- endfor -%}",
            "eos_token_id",
        ),
        # One that rewrites the question once it is answered.
        (
            "{{ '<|im_start|>' + (messages|length > 1 and '9' or '8') + messages[-1]['content'] + '<|im_end|>' }}",
            "another prompt when the response is there",
        ),
        # One that goes on after the end.
        (
            _TURN + "(m['role'] == 'assistant' and '<|im_end|>7' or '') }}{%- endfor -%}",
            "goes on after an end token",
        ),
    ],
)
def test_a_template_under_which_a_response_is_not_what_a_server_generates_is_refused(
    tmp_path: Path, template: str, words: str
) -> None:
    tokenizer = save_model(tmp_path, template)
    with pytest.raises(ValueError, match=words):
        tokenizer.encode_response([USER], "1+1=2>2")


def test_blanks_after_the_end_token_do_not_train(tmp_path: Path) -> None:
    tokenizer = save_model(
        tmp_path, _TURN + "(m['role'] == 'assistant' and '<|im_end|> ' or '') }}{%- endfor -%}"
    )
    assert tokenizer.encode_response([USER], "1+1=2>2") == WANTED
