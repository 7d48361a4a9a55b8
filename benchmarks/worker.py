"""One method in one process: `python -m benchmarks.worker --method family/name --case JSON --out FILE`.

First call (compiles, loads), correctness of the gradient against float64, peak memory of one more
call, then timed calls. Several K run in turns within one round, so that drift of the machine hits
them alike. Writes one JSON object; a failure is an exception and an exit code.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import catalog, floor
from benchmarks.case import Case
from benchmarks.catalog import Method
from benchmarks.inputs import Inputs, describe, make_inputs
from benchmarks.measure import Seconds, clock, extra_peak_bytes
from benchmarks.objective import checked_rows, reference_logits_grad, relative_error

_MIN_REPEATS = 7
# Before that many rounds, a method may take so many times `max_seconds`.
_PATIENCE = 5


class HandedOver(torch.autograd.Function):
    """The same memory as the output of an operation, as a model hands its logits over."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]


@dataclass(frozen=True)
class Step:
    """One method at one K: its tensors and the call on them."""

    call: Callable[..., torch.Tensor]
    method: Method
    inputs: Inputs

    def arguments(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """The tensors for the call, and those of them whose gradient is asked for.

        Logits are handed over as the output of an operation, as a model hands them over; only so
        may a method write over them.
        """
        x = self.inputs
        if self.method.family in (catalog.LOGITS, catalog.DENSE_LOGITS):
            if x.logits_TV is None:
                raise ValueError("logits_TV: None seen, this family starts at logits")
            logits_TV = HandedOver.apply(x.logits_TV)
            if self.method.family == catalog.LOGITS:
                return (logits_TV,), (logits_TV,)
            if x.teacher_logits_TV is None:
                raise ValueError("teacher_logits_TV: None seen, this family starts at both logits")
            return (logits_TV, x.teacher_logits_TV), (logits_TV,)
        student = (x.hidden_TH, x.weight_VH)
        wanted = student if self.method.weight_grad else student[:1]
        if self.method.family == catalog.HEAD:
            return student, wanted
        return (*student, x.teacher_hidden_TH, x.weight_VH.detach()), wanted

    def gradients(self) -> tuple[torch.Tensor, ...]:
        tensors, wanted = self.arguments()
        return torch.autograd.grad(self.call(*tensors), wanted)

    def timed(self, device: str) -> tuple[float, float]:
        tensors, wanted = self.arguments()
        start = clock(device)
        loss = self.call(*tensors)
        middle = clock(device)
        torch.autograd.grad(loss, wanted)
        return middle - start, clock(device) - middle


def _inputs(method: Method, case: Case) -> Inputs:
    inputs = make_inputs(
        case,
        with_logits=method.family in (catalog.LOGITS, catalog.DENSE_LOGITS),
        with_teacher_logits=method.family == catalog.DENSE_LOGITS,
    )
    if inputs.logits_TV is not None:
        inputs.logits_TV.requires_grad_()
    else:
        inputs.hidden_TH.requires_grad_()
        inputs.weight_VH.requires_grad_()
    return inputs


def _reference(method: Method, inputs: Inputs, topk: int, num_tokens: int) -> torch.Tensor:
    """Gradient in float64 by the first rows of the logits, or of the hidden states."""
    rows = checked_rows(num_tokens)
    with torch.no_grad():
        if inputs.logits_TV is not None:
            teacher_TV = inputs.teacher_logits_TV
            return reference_logits_grad(
                inputs.logits_TV[rows],
                None if teacher_TV is None else teacher_TV[rows],
                inputs,
                topk,
                method.terms,
            )
        weight_VH = inputs.weight_VH.double()
        grad_TV = reference_logits_grad(
            inputs.hidden_TH[rows].double() @ weight_VH.t(),
            inputs.teacher_hidden_TH[rows].double() @ weight_VH.t(),
            inputs,
            topk,
            method.terms,
        )
        return grad_TV @ weight_VH


def _restorer(method: Method, inputs: Inputs) -> Callable[[], None]:
    """Put back the logits that a method writes over; nothing to do for the others."""
    logits_TV = inputs.logits_TV
    if not method.overwrites or logits_TV is None:
        return lambda: None
    pristine_TV = logits_TV.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            logits_TV.copy_(pristine_TV)

    return restore


def _timings(steps: dict[int, Step], case: Case, restore: Callable[[], None]) -> dict[int, Seconds]:
    forward: dict[int, list[float]] = {topk: [] for topk in steps}
    backward: dict[int, list[float]] = {topk: [] for topk in steps}
    begin = clock(case.device)
    for round_index in range(case.max_repeats):
        elapsed = clock(case.device) - begin
        if elapsed > case.max_seconds * (1 if round_index >= _MIN_REPEATS else _PATIENCE):
            break
        for topk, step in steps.items():
            f, b = step.timed(case.device)
            forward[topk].append(f)
            backward[topk].append(b)
            restore()
    return {topk: Seconds(tuple(forward[topk]), tuple(backward[topk])) for topk in steps}


def run(method: Method, case: Case) -> dict[str, Any]:
    """Measure one method; see the module docstring for the order."""
    inputs = _inputs(method, case)
    module_name, function_name = method.function.split(":")
    module = importlib.import_module(f"benchmarks.methods.{module_name}")
    build = getattr(module, function_name)
    topks = case.topk if method.sweeps_topk else (case.main_topk,)
    steps = {topk: Step(build(inputs, topk), method, inputs) for topk in topks}
    references = {topk: _reference(method, inputs, topk, case.num_tokens) for topk in topks}
    restore = _restorer(method, inputs)

    measured: dict[int, dict[str, Any]] = {}
    for topk, step in steps.items():
        start = clock(case.device)
        gradient = step.gradients()[0]
        first_call_s = clock(case.device) - start
        error = relative_error(gradient[checked_rows(case.num_tokens)], references[topk])
        del gradient
        restore()
        measured[topk] = {"first_call_s": first_call_s, "gradient_relative_error": error}
    for topk, step in steps.items():
        peak = extra_peak_bytes(step.gradients, case.device)
        restore()
        measured[topk]["extra_peak_bytes"] = peak
        measured[topk]["extra_peak_L"] = peak / case.logits_bytes
    for topk, seconds in _timings(steps, case, restore).items():
        measured[topk]["seconds"] = seconds.summary()
    return {
        "method": catalog.method_id(method),
        "package_version": version(method.package) if method.package else "",
        "torch_version": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "inputs": describe(inputs),
        "by_topk": {str(topk): values for topk, values in measured.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help="family/name, or floor")
    parser.add_argument("--case", required=True, type=Case.from_json)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    is_floor = args.method == "floor"
    result = floor.run(args.case) if is_floor else run(catalog.find(args.method), args.case)
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
