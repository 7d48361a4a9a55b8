"""1,000 mutations of a real tokenizer: every one is refused and named; what changes no meaning is not."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizer_mutations import MUTATIONS, NEUTRAL, Files, make_tokenizer, read, write

from opd_megatron.config.rules import ACCEPTED_FORMS
from opd_megatron.data.token_bytes import byte_of_character, bytes_of_tokens
from opd_megatron.data.tokenizer_files import compare_tokenizers, tokenizer_fingerprint
from opd_megatron.data.tokenizer_form import FORMS
from opd_megatron.errors import ConfigError, TokenizerMismatch

COUNT = 1000


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def reader(directory: Path) -> Callable[[], Files]:
    """A fresh copy of the files at every call."""
    kept = pickle.dumps(read(directory))
    return lambda: pickle.loads(kept)


@pytest.mark.many
def test_a_thousand_mutations_are_all_refused_by_what_they_changed(
    student: Path, tmp_path: Path
) -> None:
    original, rng = reader(student), random.Random(20)
    kinds = list(MUTATIONS)
    named: Counter[str] = Counter()
    for number in range(COUNT):
        mutation = kinds[number % len(kinds)]
        files = original()
        unchanged = original()
        while files == unchanged:
            mutation(files, rng)
        write(files, tmp_path)
        with pytest.raises(ConfigError) as caught:
            compare_tokenizers(student, tmp_path)
        if isinstance(caught.value, TokenizerMismatch):
            assert caught.value.what in MUTATIONS[mutation], (mutation, caught.value)
            assert caught.value.what in str(caught.value)
            named[caught.value.what] += 1
        else:
            # A size below the largest id, an end token without an id: wrong by itself.
            assert "teachers.main.path" in str(caught.value)
            named["unusable"] += 1
    assert named.total() == COUNT
    assert set(named) >= {"tokens", "vocabulary size", "end tokens", *FORMS.values()}
    assert named["unusable"] < COUNT // 20


def test_what_changes_no_meaning_passes(student: Path, tmp_path: Path) -> None:
    original, rng = reader(student), random.Random(21)
    for number in range(50):
        files = original()
        NEUTRAL[number % len(NEUTRAL)](files, rng)
        write(files, tmp_path)
        compare_tokenizers(student, tmp_path)
        assert tokenizer_fingerprint(tmp_path).digest == tokenizer_fingerprint(student).digest


def test_forms_can_be_accepted_one_by_one_and_ids_never(student: Path, tmp_path: Path) -> None:
    assert set(FORMS) == set(ACCEPTED_FORMS)
    original, rng = reader(student), random.Random(22)
    by_name = {words: form for form, words in FORMS.items()}
    for mutation, words in MUTATIONS.items():
        files = original()
        mutation(files, rng)
        write(files, tmp_path)
        (what,) = words
        if what in by_name:
            compare_tokenizers(student, tmp_path, accept=[by_name[what]])
            others = [form for form in FORMS if form != by_name[what]]
        else:
            others = list(FORMS)
        with pytest.raises(ConfigError):
            compare_tokenizers(student, tmp_path, accept=others)


def test_bytes_of_a_real_tokenizer_are_what_its_own_decoder_says(student: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    contents = tokenizer_fingerprint(student).contents
    assert len(contents) == tokenizer.get_vocab_size()
    for index, content in contents.items():
        decoded = tokenizer.decode([index], skip_special_tokens=False)
        assert content.decode(errors="replace") == decoded
    assert sorted(byte_of_character().values()) == list(range(256))


def test_sentencepiece_and_byte_level_spellings_of_one_text_are_the_same_bytes() -> None:
    pieces = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
    ]}  # fmt: skip
    seen = bytes_of_tokens({0: "\u2581the", 1: "<0x0A>", 2: "<end>"}, {2}, pieces)
    wanted = bytes_of_tokens({0: "\u0120the", 1: "\u010a", 2: "<end>"}, {2}, {"type": "ByteLevel"})
    assert seen == wanted == {0: b" the", 1: b"\n", 2: b"<end>"}
