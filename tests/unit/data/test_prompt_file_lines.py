"""The lines of docs/recipes.md that make a prompt file, run on two small files of the data set's columns."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from opd_megatron.config.schema import DataConfig
from opd_megatron.data.rows import scan_rows

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipes.md"


def test_the_documented_lines_make_a_prompt_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DeepMath-103K" / "data").mkdir(parents=True)
    (tmp_path / "deepmath-103k").mkdir()
    for number in range(2):
        columns = {"question": [f"1+{number}?"], "final_answer": [str(1 + number)], "topic": ["x"]}
        parquet.write_table(pa.table(columns), f"DeepMath-103K/data/train-{number}.parquet")
    lines = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert lines is not None
    exec(lines.group(1), {})
    scan = scan_rows(tmp_path / "deepmath-103k" / "train.parquet", DataConfig(), [])
    assert [row.answer for row in scan.rows] == ["1", "2"]
    assert all("\\boxed{}" in str(row.prompt) for row in scan.rows)
    assert str(scan.rows[1].prompt).startswith("1+1?\n")
