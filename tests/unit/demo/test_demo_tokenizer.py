"""The tokenizer that `transformers` loads is the one the demo trains with."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd_megatron.data.chat import compare_tokenizers, tokenizer_fingerprint
from opd_megatron.demo.tokenizer import (
    CHARACTERS,
    IM_END,
    PAD,
    TOKEN_IDS,
    VOCAB_SIZE,
    decode_ids,
    encode_prompt,
    encode_text,
)

SHIPPED = Path(__file__).parents[3] / "recipes" / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED / "student", local_files_only=True)


def test_shipped_tokenizer_has_our_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.get_vocab() == TOKEN_IDS
    assert (len(tokenizer), VOCAB_SIZE) == (32, 32)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (IM_END, PAD)


def test_text_round_trips_and_encodes_like_the_training_code(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer.encode(CHARACTERS, add_special_tokens=False)
    assert ids == encode_text(CHARACTERS)
    assert tokenizer.decode(ids) == decode_ids(ids) == CHARACTERS


def test_chat_template_is_the_training_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "40+85:"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>40+85:"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt("40+85:")


def test_finished_turn_ends_with_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "1+1:"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>1+1:2<|im_end|>"


def test_system_message_and_unknown_character_are_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(TemplateError, match="not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "1"}], tokenize=False)
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("40+85?")


def test_shipped_teacher_and_student_share_the_tokenizer() -> None:
    compare_tokenizers(SHIPPED / "student", SHIPPED / "teacher")
    digests = {tokenizer_fingerprint(SHIPPED / name).digest for name in ("student", "teacher")}
    assert len(digests) == 1
