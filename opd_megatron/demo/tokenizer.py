"""A character tokenizer of 32 tokens, saved in Hugging Face layout.

    0 <pad>   1 <|endoftext|>   2 <|im_start|>   3 <|im_end|>   4.. 0123456789+-*=:>,; and space,
    a..i

The chat template has no role names: 32 characters can not spell them. A user turn is `<|im_start|>`
and the text; the assistant's text follows at once and ends with `<|im_end|>`. System messages are
refused by the template, because dropping them silently would train on another prompt than the one
in the data.

A character outside the vocabulary is an error, not an unknown token: the model would answer another
question.
"""

from __future__ import annotations

import json
from pathlib import Path

PAD, END_OF_TEXT, IM_START, IM_END = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "0123456789+-*=:>,; abcdefghi"
TOKENS = SPECIAL_TOKENS + tuple(CHARACTERS)
TOKEN_IDS = {token: index for index, token in enumerate(TOKENS)}
VOCAB_SIZE = len(TOKENS)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<|im_start|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{%- else -%}"
    "{{ raise_exception('this tokenizer has user and assistant messages only, not '"
    " + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def encode_text(text: str) -> list[int]:
    """Ids of text without special tokens. A character outside the vocabulary is a KeyError."""
    return [TOKEN_IDS[character] for character in text]


def encode_prompt(prompt: str) -> list[int]:
    """Ids of one user message under the chat template, ready for generation."""
    return [IM_START, *encode_text(prompt)]


def decode_ids(ids: list[int]) -> str:
    """Text of ids; special tokens are left out."""
    return "".join(TOKENS[index] for index in ids if index >= len(SPECIAL_TOKENS))


def _tokenizer_json() -> dict[str, object]:
    """`tokenizer.json`: every character is a word; there is no unknown token."""
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "[\\s\\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": TOKEN_IDS, "unk_token": "<unk>"},
    }


def save_tokenizer(directory: Path, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    special = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": ["<|endoftext|>", "<|im_start|>"],
        **special,
        "chat_template": CHAT_TEMPLATE,
    }
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": _tokenizer_json(),
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
