"""Supports as sets, row by row, with repeats and missing ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import LossInputError
from opd_megatron.losses.supports import SUPPORTS, SupportSources, make_support

SOURCES = SupportSources(
    vocab_size=8,
    teacher_ids_TK=torch.tensor([[3, 1, 5], [0, 1, 2], [7, 7, -1]]),
    student_ids_TK=torch.tensor([[5, 2, 3], [4, 5, 6], [7, -1, -1]], dtype=torch.int32),
    sampled_ids_T=torch.tensor([1, 6, 0]),
)
WANTED = {
    "teacher_topk": [{1, 3, 5}, {0, 1, 2}, {7}],
    "student_topk": [{2, 3, 5}, {4, 5, 6}, {7}],
    "union": [{1, 2, 3, 5}, {0, 1, 2, 4, 5, 6}, {7}],
    "intersection": [{3, 5}, set(), {7}],
    "symmetric_difference": [{1, 2}, {0, 1, 2, 4, 5, 6}, set()],
    "teacher_topk_plus_sampled": [{1, 3, 5}, {0, 1, 2, 6}, {0, 7}],
    "full": [set(range(8))] * 3,
}


@pytest.mark.parametrize("name", list(SUPPORTS))
def test_each_support_is_the_set_its_name_says(name: str) -> None:
    support = make_support(name, SOURCES)
    rows = zip(support.ids_TJ.tolist(), support.valid_TJ.tolist(), strict=True)
    for (ids, valid), wanted in zip(rows, WANTED[name], strict=True):
        counted = [i for i, v in zip(ids, valid, strict=True) if v]
        assert set(counted) == wanted
        assert len(counted) == len(wanted), "an id counts twice"
        assert {i for i, v in zip(ids, valid, strict=True) if not v} <= {0}


def test_random_rows_agree_with_python_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 20, (2, 50, 9), generator=generator)
    sources = replace(SOURCES, vocab_size=20, teacher_ids_TK=ids[0], student_ids_TK=ids[1])
    sets = [[{i for i in row if i >= 0} for row in side.tolist()] for side in ids]
    wanted = {
        "union": [a | b for a, b in zip(*sets, strict=True)],
        "intersection": [a & b for a, b in zip(*sets, strict=True)],
        "symmetric_difference": [a ^ b for a, b in zip(*sets, strict=True)],
    }
    for name, rows in wanted.items():
        support = make_support(name, sources)
        seen = [
            {i for i, v in zip(r, m, strict=True) if v}
            for r, m in zip(support.ids_TJ.tolist(), support.valid_TJ.tolist(), strict=True)
        ]
        assert seen == rows
        assert support.valid_TJ.sum(1).tolist() == [len(row) for row in rows]


def test_no_tokens_and_no_entries_are_ordinary_inputs() -> None:
    empty = SupportSources(
        vocab_size=8,
        teacher_ids_TK=torch.zeros(0, 3, dtype=torch.long),
        student_ids_TK=torch.zeros(0, 0, dtype=torch.long),
        sampled_ids_T=torch.zeros(0, dtype=torch.long),
    )
    for name in SUPPORTS:
        assert make_support(name, empty).ids_TJ.shape[0] == 0


@pytest.mark.parametrize(
    ("sources", "seen"),
    [
        (replace(SOURCES, teacher_ids_TK=None), "nothing seen"),
        (replace(SOURCES, teacher_ids_TK=torch.zeros(3, dtype=torch.long)), "[3]"),
        (replace(SOURCES, teacher_ids_TK=torch.zeros(3, 2)), "float32"),
        (replace(SOURCES, teacher_ids_TK=torch.full((3, 2), 8)), "[8, 8]"),
        (replace(SOURCES, teacher_ids_TK=torch.full((3, 2), -2)), "[-2, -2]"),
    ],
)
def test_bad_ids_name_the_tensor(sources: SupportSources, seen: str) -> None:
    with pytest.raises(LossInputError, match="teacher_ids_TK") as caught:
        make_support("union", sources)
    assert seen in str(caught.value)


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'intersection'"):
        make_support("intersecton", SOURCES)
