"""The table of metrics: every series is documented, and nothing else can be recorded."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from opd_megatron.errors import NumericsError
from opd_megatron.observe.metric_table import METRICS, METRICS_BY_NAME, Reduction
from opd_megatron.observe.metrics import UnknownMetric, checked, metrics_markdown
from opd_megatron.observe.panels import SECTIONS
from opd_megatron.observe.stages import STAGES

DOCS = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def test_docs_agree_with_the_table() -> None:
    assert DOCS.read_text() == metrics_markdown(), (
        "run `python -m opd_megatron.observe.metrics > docs/metrics.md`"
    )


def test_every_metric_has_one_well_formed_row() -> None:
    text = metrics_markdown()
    for metric in METRICS:
        (line,) = [row for row in text.splitlines() if row.startswith(f"| `{metric.name}` |")]
        assert len(re.findall(r"(?<!\\)\|", line)) == 6


def test_names_are_unique_and_meanings_are_one_sentence() -> None:
    assert len(METRICS_BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert metric.meaning.endswith(".") and ". " not in metric.meaning, metric.name
        assert re.fullmatch(r"[a-z]+(/[a-z0-9_]+){1,2}(/[0-9+-]+|/<teacher>)?", metric.name)


def test_units_in_names_agree_with_the_unit_column() -> None:
    for metric in METRICS:
        if metric.name.endswith("_frac"):
            assert metric.unit == "fraction"
        elif metric.name.endswith("_per_s"):
            assert metric.unit == "tokens/s"
        elif metric.name.endswith("_s"):
            assert metric.unit == "s"
        elif metric.name.endswith("_gib"):
            assert metric.unit == "GiB"
        if metric.name.endswith("_max"):
            assert metric.reduction is Reduction.MAX


def test_pictures_and_stages_use_known_metrics() -> None:
    panels = [panel for section in SECTIONS for panel in section.panels]
    names = {curve.metric for panel in panels for curve in panel.curves}
    names |= {panel.reference.metric for panel in panels if panel.reference}
    names |= {stage.metric for stage in STAGES}
    assert names <= METRICS_BY_NAME.keys()


def test_unknown_metric_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownMetric, match=r"'train/los'.*did you mean 'train/loss'"):
        checked({"train/los": 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_non_finite_value_is_refused_by_name(value: float) -> None:
    with pytest.raises(NumericsError, match="train/kl_reverse"):
        checked({"train/loss": 1.0, "train/kl_reverse": value})


@pytest.mark.parametrize("value", [True, "1.0", None, [1.0]])
def test_what_is_not_a_number_is_refused(value: object) -> None:
    with pytest.raises(UnknownMetric, match="must be a number"):
        checked({"train/loss": value})


def test_numpy_scalars_become_plain_numbers() -> None:
    plain = checked({"train/loss": np.float32(0.5), "train/tokens": np.int64(7)})
    assert plain == {"train/loss": 0.5, "train/tokens": 7}
    assert [type(value) for value in plain.values()] == [float, int]


def test_reductions() -> None:
    assert Reduction.MEAN.reduce([1.0, 4.0], [2.0, 1.0]) == 2.0
    assert Reduction.MEAN.reduce([1.0, 4.0]) == 2.5
    assert Reduction.MAX.reduce([1.0, 4.0, 2.0]) == 4.0
    assert Reduction.SUM.reduce([1.0, 4.0, 2.0]) == 7.0
    assert Reduction.LAST.reduce([1.0, 4.0, 2.0]) == 2.0
    with pytest.raises(ValueError):
        Reduction.MEAN.reduce([1.0, 4.0], [1.0])
