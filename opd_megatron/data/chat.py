"""The student's tokenizer: chat messages to ids, ids to text for display.

Only the student's tokenizer is ever used: the teacher is sent ids. That they mean the same to both
is checked in `tokenizer_files.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from opd_megatron.data.tokenizer_files import (
    compare_tokenizers,
    tokenizer_fingerprint,
)
from opd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTokenizer", "compare_tokenizers", "load_chat_tokenizer", "tokenizer_fingerprint"]


class ChatTokenizer:
    """A tokenizer with a chat template.

    Attributes:
        vocab_size: rows of the model's embedding.
        eos_ids: ids that end a response.
        special_ids: ids of the tokens that the tokenizer calls special.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: tuple[int, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids = frozenset(special)
        self._special_tokens = tuple(special.values())
        self.decode_token = lru_cache(maxsize=65536)(self._decode_token)

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Ids of a conversation, up to and including the start of the assistant's turn.

        Raises:
            ValueError: the template refuses the messages, a character has no token, or a message
                spells a special token. The last is most often a prompt that already went through a
                chat template.
        """
        for message in messages:
            for token in self._special_tokens:
                if token in message["content"]:
                    raise ValueError(
                        f"the text contains the special token {token!r}; give plain text, the chat "
                        "template is applied here"
                    )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
            # The template wrote every special token that belongs there.
            return tuple(self._tokenizer.encode(str(text), add_special_tokens=False))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ValueError(
                f"the student's chat template or tokenizer refuses it: {error}"
            ) from error

    def decode_response(self, response_ids: Sequence[int]) -> str:
        """Text of a response without special tokens, as a grader reads it."""
        return str(self._tokenizer.decode(list(response_ids), skip_special_tokens=True))

    def _decode_token(self, token_id: int) -> str:
        """Text of one token for display. Half a character shows as U+FFFD."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))


def load_chat_tokenizer(directory: Path, key: str = "student.path") -> ChatTokenizer:
    """Load the tokenizer of a Hugging Face model directory, without network.

    Raises:
        ConfigError: the tokenizer cannot be loaded or has no chat template.
    """
    fingerprint = tokenizer_fingerprint(directory, key)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError.of(
            key, str(directory), f"its tokenizer does not load ({error})", "copy the model again"
        ) from error
    if tokenizer.chat_template is None:
        raise ConfigError.of(
            key,
            str(directory),
            "its tokenizer has no chat template",
            "add chat_template to tokenizer_config.json; base models often take their instruct "
            "sibling's",
        )
    return ChatTokenizer(tokenizer, fingerprint.vocab_size, fingerprint.eos_ids)
