"""End tokens that differ between student and teacher: what is sent, what comes back, what may train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from opd_megatron.data.tokenizer_files import compare_tokenizers
from opd_megatron.demo.tokenizer import save_tokenizer
from opd_megatron.errors import ConfigError
from opd_megatron.teacher.aliases import TokenAliases, resolve_aliases

ENDS = TokenAliases({1: 3, 3: 1})
PAIR = {"<|endoftext|>": "<|im_end|>"}


def model(directory: Path, eos: int | list[int]) -> Path:
    save_tokenizer(directory, context_length=64)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    main = eos if isinstance(eos, int) else eos[0]
    config["eos_token"] = {1: "<|endoftext|>", 3: "<|im_end|>"}[main]
    path.write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"vocab_size": 32, "eos_token_id": eos}))
    return directory


def test_only_the_end_of_an_ended_response_is_sent_as_the_teachers() -> None:
    assert ENDS.as_teacher_reads((5, 1, 7, 1), ended=True) == (5, 1, 7, 3)
    assert ENDS.as_teacher_reads((5, 1, 7, 1), ended=False) == (5, 1, 7, 1)
    assert ENDS.as_teacher_reads((5, 7), ended=True) == (5, 7)
    assert ENDS.as_teacher_reads((), ended=True) == ()


def test_a_score_of_another_token_does_not_train() -> None:
    assert ENDS.unscorable((5, 1, 3, 1), ended=True).tolist() == [False, True, True, False]
    assert ENDS.unscorable((5, 1), ended=False).tolist() == [False, True]
    assert ENDS.unscorable((), ended=True).shape == (0,)
    assert not TokenAliases().unscorable((1, 3), ended=True).any()


def test_the_teachers_topk_comes_back_in_the_students_words() -> None:
    topk = np.asarray([[3, 5], [1, 3], [6, 7]], dtype=np.int32)
    translated = ENDS.as_student_reads(topk)
    assert translated.tolist() == [[1, 5], [3, 1], [6, 7]]
    assert topk.tolist() == [[3, 5], [1, 3], [6, 7]], "the input is left alone"
    assert ENDS.as_student_reads(translated).tolist() == topk.tolist()


def test_end_tokens_must_agree_after_the_alias(tmp_path: Path) -> None:
    base, instruct = model(tmp_path / "base", 1), model(tmp_path / "instruct", [3, 1])
    with pytest.raises(ConfigError, match=r"teachers.main.aliases\.<"):
        compare_tokenizers(base, instruct)
    compare_tokenizers(base, instruct, aliases=PAIR)
    with pytest.raises(ConfigError, match="end tokens"):
        compare_tokenizers(base, instruct, aliases={"<|endoftext|>": "<|im_start|>"})


def test_an_alias_that_breaks_equal_end_tokens_is_refused(tmp_path: Path) -> None:
    student, teacher = model(tmp_path / "s", 3), model(tmp_path / "t", 3)
    with pytest.raises(ConfigError, match="end tokens"):
        compare_tokenizers(student, teacher, aliases={"<|im_end|>": "<|endoftext|>"})


def test_aliases_are_looked_up_by_their_text(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", 1)
    assert resolve_aliases(PAIR, directory, "main") == ENDS
    assert resolve_aliases({}, directory, "main").swaps == {}
    with pytest.raises(ConfigError, match=r"no token '<\|im_ends\|>'.*did you mean '<\|im_end\|>'"):
        resolve_aliases({"<|endoftext|>": "<|im_ends|>"}, directory, "main")
    with pytest.raises(ConfigError, match="each in one pair only"):
        resolve_aliases({**PAIR, "7": "<|im_end|>"}, directory, "main")
    with pytest.raises(ConfigError, match="must be two tokens"):
        resolve_aliases({"7": "7"}, directory, "main")
