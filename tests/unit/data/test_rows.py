"""Reading prompt rows: what is refused, what it is counted as, and that nothing else is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from opd_megatron.config.schema import DataConfig
from opd_megatron.data.rows import RowScan, scan_rows
from opd_megatron.errors import DataError

GOOD = b'{"prompt": "1+1:", "answer": "2"}'


def scan(path: Path, content: bytes | None = None, **config: object) -> RowScan:
    if content is not None:
        path.write_bytes(content)
    settings = {"max_bad_rows_frac": 1.0, **config}
    return scan_rows(path, DataConfig(**settings), ["main", "math"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "x"', "broken_json"),
        (b"\xff\xfe", "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"prompt": "x", "prompt": "y"}', "broken_json"),
        (b'{"prompt": "x", "answer": 1' + b"0" * 5000 + b"}", "broken_json"),
        (b'["x"]', "wrong_type"),
        (b'{"question": "x"}', "missing_key"),
        (b'{"prompt": null}', "missing_key"),
        (b'{"prompt": 3}', "wrong_type"),
        (b'{"prompt": {"role": "user", "content": "x"}}', "wrong_type"),
        (b'{"prompt": ["x"]}', "wrong_type"),
        (b'{"prompt": [{"role": "user"}]}', "wrong_type"),
        (b'{"prompt": [{"role": "user", "content": ["x"]}]}', "wrong_type"),
        (b'{"prompt": [{"role": "user", "content": "x", "name": "y"}]}', "wrong_type"),
        (b'{"prompt": [{"role": "assistant", "content": "x"}]}', "wrong_type"),
        (b'{"prompt": "x", "answer": 0.5}', "wrong_type"),
        (b'{"prompt": "x", "answer": true}', "wrong_type"),
        (b'{"prompt": "  "}', "empty"),
        (b'{"prompt": []}', "empty"),
        (b'{"prompt": "x", "id": ""}', "empty"),
        (b'{"prompt": "a\\u0000b"}', "bad_characters"),
        (b'{"prompt": "a\\ud800b"}', "bad_characters"),
        (b'{"prompt": "x", "answer": "\\udc00"}', "bad_characters"),
        (b'{"prompt": "x", "teacher": "maths"}', "unknown_teacher"),
    ],
)
def test_bad_row_is_refused_with_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    result = scan(tmp_path / "p.jsonl", GOOD + b"\n\n" + line + b"\n" + GOOD)
    assert [row.source for row in result.rows] == ["p.jsonl:1", "p.jsonl:4"]
    assert dict(result.rejections.by_reason) == {reason: 1}
    assert result.rejections.examples[0].startswith(f"p.jsonl:3: {reason}: ")


def test_typo_in_a_teacher_gets_a_suggestion(tmp_path: Path) -> None:
    result = scan(tmp_path / "p.jsonl", GOOD + b'\n{"prompt": "x", "teacher": "maths"}')
    assert "did you mean 'math'?" in result.rejections.examples[0]


def test_second_row_with_the_same_id_is_refused_and_names_the_first(tmp_path: Path) -> None:
    line = b'{"prompt": "x", "id": "a"}\n'
    result = scan(tmp_path / "p.jsonl", line + GOOD + b"\n" + line)
    assert result.rows[0].id == "a"
    assert result.rejections.examples == ["p.jsonl:3: duplicate_id: id 'a' is also at p.jsonl:1"]


def test_rows_without_id_get_stable_distinct_ids(tmp_path: Path) -> None:
    content = GOOD + b"\n" + GOOD
    first = scan(tmp_path / "p.jsonl", content)
    again = scan(tmp_path / "p.jsonl")
    assert first.rows == again.rows
    assert first.rows[0].id != first.rows[1].id


def test_all_fields_of_a_good_row_are_kept(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "\u00e4?"}]
    line = json.dumps({"q": messages, "a": 7, "teacher": "math", "id": 12, "other": 1})
    content = b"\xef\xbb\xbf" + line.encode() + b"\r\n"
    (row,) = scan(tmp_path / "p.jsonl", content, prompt_key="q", answer_key="a").rows
    assert (row.prompt, row.answer, row.teacher, row.id) == (tuple(messages), "7", "math", "12")


def test_budget_is_inclusive_and_its_error_lists_counts_and_first_rows(tmp_path: Path) -> None:
    content = b"\n".join([GOOD] * 8 + [b"{", b"[]"])
    assert len(scan(tmp_path / "p.jsonl", content, max_bad_rows_frac=0.2).rows) == 8
    with pytest.raises(DataError) as caught:
        scan(tmp_path / "p.jsonl", max_bad_rows_frac=0.19)
    message = str(caught.value)
    assert "2 of 10 rows" in message and "broken_json 1, wrong_type 1" in message
    assert "p.jsonl:9: broken_json" in message and "p.jsonl:10: wrong_type" in message
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("p.csv", b"x", "only .jsonl and .parquet"),
        ("p.jsonl", b"\n\n", "no rows"),
        ("p.jsonl", b"{", "cannot be used"),
        ("p.parquet", b"x", "not a parquet file"),
        ("none.jsonl", None, "no such file"),
    ],
)
def test_unusable_file_is_a_data_error_that_names_key_and_file(
    tmp_path: Path, name: str, content: bytes | None, rule: str
) -> None:
    with pytest.raises(DataError, match=rule) as caught:
        scan(tmp_path / name, content)
    assert "data.train=" in str(caught.value) and name in str(caught.value)


def test_parquet_rows_equal_jsonl_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "1+1:"}], "answer": 2, "id": "a", "other": 0.5},
        {"prompt": [{"role": "user", "content": "2+2:"}], "answer": None, "id": "b", "other": 0.5},
        {"prompt": [], "answer": 1, "id": "c", "other": 0.5},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    from_parquet = scan(tmp_path / "p.parquet")
    from_jsonl = scan(tmp_path / "p.jsonl", b"\n".join(json.dumps(r).encode() for r in rows))
    strip = [(row.id, row.prompt, row.answer) for row in from_parquet.rows]
    assert strip == [(row.id, row.prompt, row.answer) for row in from_jsonl.rows]
    assert from_parquet.rejections.examples == ["p.parquet:3: empty: 'prompt' has no messages"]


def test_parquet_null_message_fields_are_ignored_and_bad_utf8_is_refused(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    rows = [[{"role": "user", "content": "x", "name": None}]]
    parquet.write_table(
        pa.table({"prompt": pa.array(rows, pa.list_(message))}), tmp_path / "a.parquet"
    )
    (row,) = scan(tmp_path / "a.parquet").rows
    assert row.prompt == ({"role": "user", "content": "x"},)

    raw = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"prompt": raw}), tmp_path / "b.parquet")
    result = scan(tmp_path / "b.parquet")
    assert len(result.rows) == 1
    assert dict(result.rejections.by_reason) == {"bad_characters": 1}


def test_missing_parquet_column_is_named_with_a_suggestion(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"prompts": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"data.prompt_key='prompt'.*did you mean 'prompts'"):
        scan(tmp_path / "p.parquet")


@given(st.lists(st.sampled_from([GOOD, b"{", b"[]", b'{"prompt": ""}', b"", b"\xff"]), min_size=1))
def test_every_row_is_either_kept_or_counted(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    lines = [GOOD, *lines]
    path = tmp_path_factory.mktemp("rows") / "p.jsonl"
    result = scan(path, b"\n".join(lines))
    assert len(result.rows) == lines.count(GOOD)
    assert len(result.rows) + result.rejections.by_reason.total() == result.num_rows
    assert result.num_rows == sum(bool(line.strip()) for line in lines)
