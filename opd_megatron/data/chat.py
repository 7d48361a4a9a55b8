"""The student's tokenizer: chat messages to ids, ids to text for display.

Only the student's tokenizer is ever used: the teacher is sent ids. That they mean the same to both
is checked in `tokenizer_files.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        thinking: str = "template",
    ) -> None:
        self._tokenizer = tokenizer
        self._switch: dict[str, Any] = (
            {} if thinking == "template" else {"enable_thinking": thinking == "always"}
        )
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
        return self._encode(self._render(messages, is_answered=False))

    def encode_response(self, messages: Sequence[dict[str, str]], response: str) -> tuple[int, ...]:
        """Ids of a given response to `messages`, as a server generates one: up to the end token.

        It is what the template writes after the start of the assistant's turn, tokenized apart from the prompt,
        so that the prompt's ids are those of a rollout.

        Raises:
            ValueError: as `encode_messages`; or the template does not write the answer behind the prompt, or ends
                it with a token at which a server would not stop.
        """
        prompt = self._render(messages, is_answered=False)
        answered = [*messages, {"role": "assistant", "content": response}]
        conversation = self._render(answered, is_answered=True)
        if not conversation.startswith(prompt):
            raise ValueError(
                "the chat template writes another prompt when the response is there: "
                f"{conversation[: len(prompt)]!r} is not {prompt!r}"
            )
        ids = self._encode(conversation[len(prompt) :])
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        if end is None:
            raise ValueError(
                f"the chat template ends the response with {conversation[-20:]!r}, in which no end token of the model "
                f"is ({', '.join(map(self.decode_token, self.eos_ids))}); add its end token to eos_token_id in "
                "generation_config.json"
            )
        if self.decode_response(ids[end + 1 :]).strip():
            raise ValueError(
                f"the response goes on after an end token, {self.decode_token(ids[end])!r}"
            )
        return ids[: end + 1]

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a text as it stands, outside of any conversation; it may spell special tokens.

        Raises:
            ValueError: a character has no token.
        """
        return self._encode(text)

    def encode_observation(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Ids of the messages that answer the assistant, from its end token (without it) to its next turn.

        Raises:
            ValueError: as `encode_messages`; or the template writes no end token behind the assistant's turn.
        """
        # What stands before them does not matter, but templates want a conversation to begin with the user.
        before = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        ids = self._encode(self._render([*before, *messages], is_answered=False))
        opening = self._encode(self._render(before[:1], is_answered=False))
        rest = ids[len(opening) :]
        end = next((i for i, token in enumerate(rest) if token in self.eos_ids), None)
        if end is None or ids[: len(opening)] != opening:
            raise ValueError(
                "the chat template does not end an assistant's message with an end token of the model"
            )
        return rest[end + 1 :]

    def _render(self, messages: Sequence[dict[str, str]], *, is_answered: bool) -> str:
        """The conversation as text; unanswered, up to the start of the assistant's turn."""
        for message in messages:
            for token in self._special_tokens:
                if token in message["content"]:
                    raise ValueError(
                        f"the text contains the special token {token!r}; give plain text, the chat "
                        "template is applied here"
                    )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    add_generation_prompt=not is_answered,
                    tokenize=False,
                    **self._switch,
                )
            )
        except Exception as error:  # templates raise what they like
            raise _refused(error) from error

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            # The template wrote every special token that belongs there.
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise _refused(error) from error

    def decode_response(self, response_ids: Sequence[int]) -> str:
        """Text of a response without special tokens, as a grader reads it."""
        return str(self._tokenizer.decode(list(response_ids), skip_special_tokens=True))

    def _decode_token(self, token_id: int) -> str:
        """Text of one token for display. Half a character shows as U+FFFD."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))


def _refused(error: Exception) -> ValueError:
    return ValueError(f"the student's chat template or tokenizer refuses it: {error}")


def _load(directory: Path) -> PreTrainedTokenizerBase:
    if (directory / "tokenizer.json").is_file():
        # The very file that the fingerprint is of. AutoTokenizer would choose a class by name, which may build
        # another pre-tokenizer than the file has, and imports torch to do so.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_chat_tokenizer(
    directory: Path, key: str = "student.path", *, thinking: str = "template"
) -> ChatTokenizer:
    """Load the tokenizer of a Hugging Face model directory, without network.

    Args:
        thinking: `data.thinking` of the recipe.

    Raises:
        ConfigError: the tokenizer cannot be loaded or has no chat template.
    """
    fingerprint = tokenizer_fingerprint(directory, key)
    try:
        tokenizer = _load(directory)
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
    return ChatTokenizer(tokenizer, fingerprint.vocab_size, fingerprint.eos_ids, thinking)
