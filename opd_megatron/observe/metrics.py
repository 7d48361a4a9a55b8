"""Metric names and values are checked against the one table; docs/metrics.md is generated from it.

    python -m opd_megatron.observe.metrics > docs/metrics.md

A name that is not in the table is refused, so there is no undocumented series; so is a NaN or an
infinity.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import groupby
from numbers import Integral, Real

from opd_megatron.errors import NumericsError, did_you_mean
from opd_megatron.observe.metric_table import METRICS, METRICS_BY_NAME, Metric, find_metric


class UnknownMetric(ValueError):
    """A metric that is not in the table: a defect of this project, not of a configuration."""


def checked(values: Mapping[str, object]) -> dict[str, float | int]:
    """Return the metrics as plain Python numbers, or refuse them.

    Args:
        values: metric name to number; NumPy scalars are accepted.

    Raises:
        UnknownMetric: a name that is not in the table, or a value that is not a number.
        NumericsError: a NaN or an infinity, with the name of the metric.
    """
    numbers: dict[str, float | int] = {}
    for name, value in values.items():
        if find_metric(name) is None:
            raise UnknownMetric(
                f"metric {name!r} is not in the table{did_you_mean(name, METRICS_BY_NAME)}; "
                f"a new metric needs a row in opd_megatron/observe/metric_table.py"
            )
        if isinstance(value, bool) or not isinstance(value, Real):
            raise UnknownMetric(f"metric {name}={value!r}: must be a number")
        number = int(value) if isinstance(value, Integral) else float(value)
        if not math.isfinite(number):
            raise NumericsError(f"metric {name}={number}: must be finite; it is not recorded")
        numbers[name] = number
    return numbers


_HEADER = """\
# Metrics

<!-- Written by `python -m opd_megatron.observe.metrics`; edit metric_table.py there. -->

`metrics.jsonl` in a run directory has one row per step: `step`, `attempt` (1 for the first start,
one more for each resume), `time_s` (Unix time at which the row was written) and the metrics below.
A metric that was not measured at a step is absent from its row. Step 0 is the student before
training: only evaluation appears there. Of a name that ends with `<teacher>` there is one series for each teacher.

Log-probs are natural logarithms, so KL and entropy are in nats. `pi` is the student, `q` the
teacher. **Reduction** says how the values of tokens, samples, micro-batches and ranks become the
value of the step; a mean is weighted by what it counts (tokens or samples), never a mean of means.
"""


def _markdown_row(metric: Metric) -> str:
    meaning = metric.meaning.replace("|", "\\|")
    return (
        f"| `{metric.name}` | {metric.unit} | {metric.reduction.value} | {meaning} "
        f"| {metric.source} |"
    )


def metrics_markdown() -> str:
    """The text of docs/metrics.md."""
    lines = [_HEADER]
    for group, metrics in groupby(METRICS, key=lambda metric: metric.name.split("/")[0]):
        lines += [f"## {group}", ""]
        lines += ["| name | unit | reduction | meaning | measured by |", "|---|---|---|---|---|"]
        lines += [_markdown_row(metric) for metric in metrics]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(metrics_markdown())
