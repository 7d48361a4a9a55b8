"""Checked rows to a `PromptSet`: encoded with the student's chat template, one hash for all.

    scan_rows(path, ...)       no tokenizer    -> RowScan     (rows.py)
    encode_prompts(scan, ...)  the student's   -> PromptSet

For supervised training a prompt carries the row's response too, encoded as what a server would have
generated: up to the end token. It has no more than `rollout.max_new_tokens`, as a rollout.

The content hash covers what training sees (ids, token ids, answers, teachers, in order). A resumed
run compares it, so data edited since the commit, or a changed tokenizer, is refused instead of
silently trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from opd_megatron.config.schema import DataConfig
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.data.order import AlternatingOrder, PromptOrder
from opd_megatron.data.rows import BadRow, Message, Row, RowScan, scan_rows
from opd_megatron.types import Prompt

__all__ = ["PromptSet", "encode_prompts", "load_prompts", "scan_rows"]


@dataclass(frozen=True)
class PromptSet:
    """Usable prompts in file order. `rejected` counts the other rows by reason."""

    prompts: tuple[Prompt, ...]
    rejected: dict[str, int]
    rejected_examples: tuple[str, ...]
    content_hash: str
    path: Path

    def __len__(self) -> int:
        return len(self.prompts)

    def order(self, config: DataConfig, seed: int) -> PromptOrder | AlternatingOrder:
        """The order in which training meets the prompts."""
        if config.alternate_domains:
            domains = [prompt.domain for prompt in self.prompts]
            return AlternatingOrder(self.content_hash, seed, domains, config.shuffle)
        return PromptOrder(self.content_hash, seed, len(self), config.shuffle)


def encode_prompts(
    scan: RowScan,
    tokenizer: ChatTokenizer,
    config: DataConfig,
    max_response_tokens: int | None = None,
) -> PromptSet:
    """Encode every row; rows that the tokenizer refuses or that are too long join the refused ones.

    Args:
        max_response_tokens: of the response that each row holds, end token included; None: rows hold none.

    Raises:
        DataError: more refused rows, together with those of the scan, than
            `data.max_bad_rows_frac`.
    """
    rejections = scan.rejections.copy()
    prompts: list[Prompt] = []
    for row in scan.rows:
        try:
            prompt = _encode_row(row, tokenizer, config.max_prompt_tokens)
            if max_response_tokens is not None:
                prompt = _with_response(prompt, row, tokenizer, max_response_tokens)
            prompts.append(prompt)
        except BadRow as error:
            rejections.add(row.source, error)
    rejections.check_budget(scan.key, scan.path, scan.num_rows, config.max_bad_rows_frac)
    return PromptSet(
        prompts=tuple(prompts),
        rejected=dict(rejections.by_reason),
        rejected_examples=tuple(rejections.examples),
        content_hash=_content_hash(prompts),
        path=scan.path,
    )


def load_prompts(
    path: Path,
    config: DataConfig,
    teachers: Collection[str],
    tokenizer: ChatTokenizer,
    key: str = "data.train",
    max_response_tokens: int | None = None,
) -> PromptSet:
    """Both passes. See `scan_rows` and `encode_prompts` for arguments and errors."""
    scan = scan_rows(path, config, teachers, key, with_response=max_response_tokens is not None)
    return encode_prompts(scan, tokenizer, config, max_response_tokens)


def _messages(row: Row) -> tuple[Message, ...]:
    prompt = row.prompt
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def _with_response(
    prompt: Prompt, row: Row, tokenizer: ChatTokenizer, max_response_tokens: int
) -> Prompt:
    assert row.response is not None, "rows were scanned with responses"
    try:
        response_ids = tokenizer.encode_response(_messages(row), row.response)
    except ValueError as error:
        raise BadRow("not_encodable", str(error)) from error
    if len(response_ids) > max_response_tokens:
        raise BadRow(
            "over_long",
            f"a response of {len(response_ids)} tokens, rollout.max_new_tokens={max_response_tokens}",
        )
    return replace(prompt, response_ids=response_ids)


def _encode_row(row: Row, tokenizer: ChatTokenizer, max_prompt_tokens: int) -> Prompt:
    messages = _messages(row)
    try:
        token_ids = tokenizer.encode_messages(messages)
    except ValueError as error:
        raise BadRow("not_encodable", str(error)) from error
    if len(token_ids) > max_prompt_tokens:
        raise BadRow(
            "over_long", f"{len(token_ids)} tokens, data.max_prompt_tokens={max_prompt_tokens}"
        )
    return Prompt(
        id=row.id,
        token_ids=token_ids,
        text=messages[-1]["content"],
        answer=row.answer,
        teacher=row.teacher,
        source=row.source,
        domain=row.domain,
    )


def _content_hash(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        record: list[object] = [prompt.id, prompt.token_ids, prompt.answer, prompt.teacher]
        if prompt.response_ids is not None:
            record.append(prompt.response_ids)
        if prompt.domain is not None:
            record.append({"domain": prompt.domain})
        digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()
