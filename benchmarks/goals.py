"""The goals of the loss core, each computed from one run: value, target, met or missed.

A goal whose methods did not run is "not measured", never a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import catalog
from benchmarks.case import Case
from benchmarks.catalog import Method

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """One line of the goals table. `value` is None where a method it needs was not measured."""

    text: str
    value: float | None
    limit: float
    at_most: bool
    unit: str

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "met" if met else "missed"


class Run:
    """Look-ups in the results of one run: by method identifier, then by K."""

    def __init__(self, case: Case, results: Results, floor: dict[str, float] | None) -> None:
        self.case, self.results, self.floor = case, results, floor

    def at(self, identifier: str, topk: int | None = None) -> dict[str, Any] | None:
        result = self.results.get(identifier)
        if result is None or "by_topk" not in result:
            return None
        return result["by_topk"].get(str(topk or self.case.main_topk))

    def peak(self, identifier: str) -> float | None:
        """Extra peak memory in units of the bfloat16 logits."""
        row = self.at(identifier)
        return None if row is None else row["extra_peak_L"]

    def seconds(
        self, identifier: str, field: str = "median", topk: int | None = None
    ) -> float | None:
        row = self.at(identifier, topk)
        return None if row is None else row["seconds"][field]


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def _smallest_peak(
    run: Run, is_rival: Callable[[Method], bool], family: str = catalog.LOGITS
) -> float | None:
    """Of the rivals with the terms that ours has in this family; all terms of TRL's head, which has two."""
    peaks = [
        run.peak(catalog.method_id(method))
        for method in catalog.METHODS
        if method.family == family
        and (set(method.terms) == _OPD or family != catalog.LOGITS)
        and is_rival(method)
    ]
    return min((peak for peak in peaks if peak is not None), default=None)


_OPD = {catalog.KL, catalog.SAMPLED, catalog.ENTROPY}
# From hidden states, as the learner runs it: the weight's gradient goes to a buffer that is there anyway.
_FROM_HIDDEN = "ours chunked, into main_grad"


def _shared(run: Run, stored: str, in_place: str) -> Iterator[Goal]:
    best_peer = _smallest_peak(run, lambda method: method.kind == catalog.PEER)
    best_other = _smallest_peak(run, lambda method: method.kind != catalog.OURS)
    least, most = min(run.case.topk), max(run.case.topk)
    yield Goal("extra peak, stored", run.peak(stored), 1.2, True, "L")
    yield Goal("extra peak, in place", run.peak(in_place), 0.25, True, "L")
    for name, identifier in (("stored", stored), ("in place", in_place)):
        ours = run.peak(identifier)
        text = f"extra peak, {name}, over that of the best"
        yield Goal(f"{text} peer with the same terms", _ratio(ours, best_peer), 1 / 3, True, "x")
        yield Goal(f"{text} of peers and baselines", _ratio(ours, best_other), 1 / 3, True, "x")
    for words, family in (
        ("from hidden states", catalog.HEAD),
        ("dense from hidden states", catalog.DENSE_HEAD),
    ):
        best = _smallest_peak(run, lambda method: method.kind == catalog.PEER, family)
        ours = run.peak(f"{family}/{_FROM_HIDDEN}")
        text = f"extra peak, {words}, over that of the best peer"
        yield Goal(text, _ratio(ours, best), 1 / 3, True, "x")
    for name, identifier in (("stored", stored), ("in place", in_place)):
        growth = _ratio(run.seconds(identifier, "min", most), run.seconds(identifier, "min", least))
        yield Goal(
            f"time, {name}, growth from K = {least} to {most}",
            None if growth is None else 100 * (growth - 1),
            5.0,
            True,
            "%",
        )


def _cpu(run: Run) -> Iterator[Goal]:
    stored, in_place = "logits/ours compiled", "logits/ours compiled in place"
    yield from _shared(run, stored, in_place)
    speedup = _ratio(run.seconds("logits/naive", "min"), run.seconds(stored, "min"))
    yield Goal("speed, stored, over naive", speedup, 3.0, False, "x")


def _cuda(run: Run) -> Iterator[Goal]:
    stored, in_place = "logits/ours triton", "logits/ours triton in place"
    yield from _shared(run, stored, in_place)
    speedup = _ratio(run.seconds("logits/naive", "min"), run.seconds(stored, "min"))
    yield Goal("speed, stored, over naive", speedup, 8.0, False, "x")
    bandwidth = None if run.floor is None else run.floor["copy_bytes_per_s"]
    # Forward reads each logit once; backward reads it and writes its gradient.
    for phase, num_passes in (("forward", 1), ("backward", 2)):
        seconds = run.seconds(stored, f"{phase}_median")
        reached = _ratio(num_passes * run.case.logits_bytes, seconds)
        share = _ratio(reached, bandwidth)
        percent = None if share is None else 100 * share
        yield Goal(f"row kernel, {phase}, of copy bandwidth", percent, 80.0, False, "%")
    products = None if run.floor is None else run.floor["three_matmuls_s"]
    head = run.seconds("head/ours chunked, gradient in forward")
    yield Goal("head + loss over its three products", _ratio(head, products), 1.25, True, "x")


def goals(run: Run) -> list[Goal]:
    return list(_cuda(run) if run.case.device == "cuda" else _cpu(run))
