"""How `opd probe` ranks teachers and shows what was measured, what is an estimate and what was not measured."""

from __future__ import annotations

import io

from rich.console import Console

from opd_megatron.controller.probe import ProbeRow, ranked
from opd_megatron.controller.probe_main import notes_of, table_of

NEAR = ProbeRow("near", "sglang", 0.5, 0.1, 0.01, 0.2, True, 0.9, 0.8, 0.7, 0.95, 400, 1.5)
FAR = ProbeRow("far", "sglang", 0.5, 0.9, 0.01, 1.2, False, 0.3, 0.2, 0.1, 0.02, 400, 1.5)
BEST = ProbeRow("best", "sglang", 0.9, 2.0, 0.01, 3.0, True, 0.2, 0.1, 0.1, None, 400, 1.5)
INSIDE = ProbeRow("inside", "in_process", None, 0.05, 0.01, 0.06, True, num_tokens=400, seconds=2.0)
STUDENT = ProbeRow("student", "sglang", 0.4, num_tokens=400)


def shown(*rows: ProbeRow) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=120).print(table_of(STUDENT, ranked(rows)))
    return text.getvalue().splitlines()


def test_accuracy_ranks_first_then_distance_and_what_is_not_measured_comes_last() -> None:
    names = [row.name for row in ranked([INSIDE, FAR, NEAR, BEST])]
    assert names == ["best", "near", "far", "inside"]
    unknown = ProbeRow("unknown", "in_process")
    assert [row.name for row in ranked([unknown, INSIDE])] == ["inside", "unknown"]


def test_estimates_and_bounds_are_marked_and_missing_values_are_dashes() -> None:
    text = "\n".join(shown(FAR, INSIDE, NEAR))
    assert "~0.900" in text and ">=1.20" in text
    assert "~0.100" not in text and "0.100" in text
    inside = next(line for line in shown(FAR, INSIDE) if "inside" in line)
    assert inside.count(" - ") >= 4
    assert "400 response tokens of the student" in text
    assert next(line for line in text.splitlines() if "student" in line and "│" in line)


def test_ends_that_do_not_agree_point_to_the_aliases() -> None:
    assert len(notes_of([NEAR])) == 1
    said = "\n".join(notes_of([FAR, BEST]))
    assert "teacher far ends responses elsewhere" in said and "teachers.far.aliases" in said
    assert "teacher best" not in said and "a lower bound" in said


def test_an_estimate_from_other_tokens_than_the_student_s_own_is_called_none() -> None:
    assert not any("no KL" in line for line in notes_of([FAR]))
    assert any("no KL" in line for line in notes_of([FAR], is_plain=False))
    assert not any("no KL" in line for line in notes_of([NEAR], is_plain=False)), "it is exact"
