"""The pictures of the report as inline SVG: text stays text, curves are labelled at their ends.

matplotlib is imported when the first picture is drawn, and used without pyplot, so there is no
global state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from opd_megatron.observe.formats import human_value
from opd_megatron.observe.panels import GREY, Curve, Panel
from opd_megatron.observe.run_files import RunFiles
from opd_megatron.observe.stages import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE_IN = (4.6, 2.45)  # small on purpose: shown larger, so that the text stays readable on a phone
_TIME_SIZE_IN = (5.6, 3.0)
_RIGHT_MARGIN_IN = 0.95  # room for the labels at the ends of the curves
_ROUND = [1, 2, 5, 10]  # steps between ticks
_LABEL_GAP = 0.185  # least distance between two labels, in heights of the axes
_SMOOTH_FROM = 24  # rows: fewer points are shown as they are
_MAX_BARS = 120
_RC: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.edgecolor": "#c3c9d2",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#5b6472",
    "xtick.color": "#c3c9d2",
    "ytick.color": "#c3c9d2",
    "xtick.labelcolor": "#5b6472",
    "ytick.labelcolor": "#5b6472",
    "axes.formatter.useoffset": False,
}


@contextmanager
def _axes(
    size_in: tuple[float, float], right_in: float, salt: str, svg: list[str]
) -> Iterator[Axes]:
    """Axes of one picture; its SVG text is put into `svg` at the end.

    Args:
        right_in: margin on the right, for labels.
        salt: keeps the ids of this picture apart from those of others on the same page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_RC, "svg.hashsalt": salt}):
        figure = Figure(figsize=size_in)
        FigureCanvasSVG(figure)
        width, height = size_in
        left, bottom, top = 0.42 / width, 0.36 / height, 0.27 / height
        right = right_in / width
        axes = figure.add_axes((left, bottom, 1 - left - right, 1 - bottom - top))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=2.5)
        axes.grid(axis="y", color="#eceff3", linewidth=0.8)
        axes.set_axisbelow(True)
        yield axes
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg.append(_inline(text.getvalue()))


def _inline(document: str) -> str:
    """The <svg> element alone, without a size of its own: it fills its place on the page."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    opening, rest = element.split(">", 1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    return f"{opening}>{rest}"


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a twelfth of the run; short runs come back as they are."""
    count = len(values)
    half = 0 if count < _SMOOTH_FROM else max(1, count // 24)
    return [
        math.fsum(part) / len(part)
        for part in (values[max(0, i - half) : i + half + 1] for i in range(count))
    ]


def _unit_at_top(axes: Axes, unit: str) -> None:
    axes.text(-0.02, 1.05, unit, transform=axes.transAxes, color="#5b6472", va="bottom", size=7.5)


def _mark_restarts(axes: Axes, restarts: Sequence[int]) -> None:
    for number, step in enumerate(restarts):
        axes.axvline(step - 0.5, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        if number == 0:
            axes.annotate(
                "restart",
                (step - 0.5, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, 1),
                textcoords="offset points",
                color=GREY,
                size=7,
            )


def _draw_curve(axes: Axes, curve: Curve, steps: Sequence[int], values: Sequence[float]) -> float:
    """Draw one series and return the value at which its label belongs."""
    if curve.dots:
        axes.plot(steps, values, color=curve.color, linewidth=1.6, marker="o", markersize=3.4)
        return values[-1]
    smooth = running_mean(values)
    if len(values) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.3)
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, smooth, color=curve.color, linewidth=1.6, marker=marker, markersize=3)
    return smooth[-1]


def _limits(panel: Panel, values: Sequence[float]) -> tuple[float, float]:
    """Range of the value axis: the data with some air, at least `span`, inside hard limits."""
    low, high = min(values), max(values)
    span = max(high - low, panel.span, abs(high) * 0.02, 1e-9)
    if panel.low is not None:
        low = min(low, panel.low)
        span = max(span, high - low)
    air = 0.08 * span
    middle = (low + high) / 2
    top = max(high + air, middle + span / 2)
    bottom = min(low - air, middle - span / 2)
    if panel.low is not None and low >= panel.low:
        bottom, top = panel.low, max(top, panel.low + span)
    return bottom, top if panel.high is None else panel.high * 1.02


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move label heights apart to at least `gap`, keeping their order, inside [0, 1]."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, now in pairwise(order):
        placed[now] = max(placed[now], placed[before] + gap)
    excess = max((placed[i] for i in order), default=0.0) - 1.0
    ceiling = 1.0
    if excess > 0:
        for i in reversed(order):
            placed[i] = min(placed[i], ceiling)
            ceiling = placed[i] - gap
    return placed


def _label_ends(axes: Axes, labels: Sequence[tuple[str, str, float]]) -> None:
    """Write `(text, colour, value)` to the right of the axes, at the height of the value."""
    to_axes = axes.transAxes.inverted()
    heights = [
        float(to_axes.transform(axes.transData.transform((1.0, value)))[1])
        for _, _, value in labels
    ]
    spread = _spread([min(max(h, 0.0), 1.0) for h in heights], _LABEL_GAP)
    for (text, color, _), height in zip(labels, spread, strict=True):
        axes.text(1.02, height, text, transform=axes.transAxes, color=color, va="center", size=7.5)


def draw_panel(panel: Panel, run: RunFiles) -> str | None:
    """One picture as an SVG element, None when none of its metrics was recorded."""
    curves = [one for curve in panel.curves for one in curve.of_each(run.names(curve.metric))]
    series = [(curve, *_plottable(panel, *run.series(curve.metric))) for curve in curves]
    series = [(curve, steps, values) for curve, steps, values in series if values]
    if not series:
        return None
    reference = panel.reference
    reference_value = run.last(reference.metric) if reference else None
    svg: list[str] = []
    with _axes(_SIZE_IN, _RIGHT_MARGIN_IN, panel.title, svg) as axes:
        ends = [(curve, _draw_curve(axes, curve, x, y)) for curve, x, y in series]
        shown = [value for _, _, values in series for value in values]
        if reference is not None and reference_value is not None:
            axes.axhline(
                reference_value, color=reference.color, linewidth=1.2, linestyle=(0, (4, 2))
            )
            ends.append((reference, reference_value))
            shown.append(reference_value)
        _set_axes(axes, panel, shown, last_step=max(row["step"] for row in run.rows))
        _mark_restarts(axes, run.restarts)
        unit = "fraction" if panel.percent else panel.unit
        labels = [
            (f"{curve.label}\n{human_value(value, unit)}", curve.color, value)
            for curve, value in ends
        ]
        _label_ends(axes, labels)
    return svg[0]


def _plottable(
    panel: Panel, steps: Sequence[int], values: Sequence[float]
) -> tuple[list[int], list[float]]:
    """The points that the panel can show: a logarithmic axis has no place for zeros."""
    pairs = [
        (step, value)
        for step, value in zip(steps, values, strict=True)
        if value > 0 or not panel.logarithmic
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _set_axes(axes: Axes, panel: Panel, shown: Sequence[float], last_step: int) -> None:
    """Scales, ticks and units. All pictures share the step axis, to compare at a glance."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if panel.logarithmic:
        axes.set_yscale("log")
        low, high = math.log10(min(shown)), math.log10(max(shown) * 1.01)
        axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
        axes.minorticks_off()
    else:
        axes.set_ylim(*_limits(panel, shown))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_ROUND))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_ROUND))
    axes.set_xlabel("step", labelpad=1, size=7.5)
    axes.set_xlim(-0.01 * last_step, last_step * 1.01 if last_step else 1)
    _unit_at_top(axes, panel.unit)


def draw_time(run: RunFiles) -> str | None:
    """Seconds per step, stacked by stage; long runs as means over neighbouring steps."""
    from matplotlib.ticker import MaxNLocator

    timed = [row for row in run.rows if row.get("perf/step_s", 0) > 0]
    if not timed:
        return None
    per_bar = math.ceil(len(timed) / _MAX_BARS)
    groups = [timed[i : i + per_bar] for i in range(0, len(timed), per_bar)]
    places = [sum(row["step"] for row in group) / len(group) for group in groups]
    bottoms = [0.0] * len(groups)
    svg: list[str] = []
    with _axes(_TIME_SIZE_IN, 0.08, "time", svg) as axes:
        for stage in STAGES:
            if not any(stage.metric in row for row in timed):
                continue
            heights = [sum(r.get(stage.metric, 0.0) for r in g) / len(g) for g in groups]
            axes.bar(places, heights, per_bar * 0.86, bottoms, color=stage.color, linewidth=0)
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=_ROUND))
        axes.set_xlabel("step", labelpad=1, size=7.5)
        axes.set_xlim(places[0] - per_bar, places[-1] + per_bar)
        _unit_at_top(axes, "seconds per step")
        _mark_restarts(axes, run.restarts)
    return svg[0]
