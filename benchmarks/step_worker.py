"""One rank of one case: `torchrun ... -m benchmarks.step_worker --case JSON --work DIR --measure time|memory`.

time     our step and a bare Megatron step in turns, on the same micro-batches and the same model; then our step with
         a clock around the functions that it calls; then publish and save
memory   the high-water mark of two steps over what the process had before it built the model

The bare step is Megatron's schedule over packed micro-batches that are on the device already, the model's own
vocabulary-parallel cross-entropy, gradient reduction and norm. Ours is the learner's `train` command without its
optimizer update: it also reads the batch file, packs it, plans the loss, computes entropies, importance weights and
advantages, collects per-token values from all ranks and writes them. The modes that hand hidden states through have no
bare step.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import clock, code_bytes, give_back, peak_bytes, reset_peak, resident_bytes
from benchmarks.step_cases import StepCase
from benchmarks.step_clock import Clocked
from opd_megatron.exchange.batch_file import read_batch, read_index
from opd_megatron.megatron import cpu_shim, parallel, step
from opd_megatron.megatron.commands import run_command
from opd_megatron.megatron.forward import DeviceMicroBatch, pack_for_rank, to_device
from opd_megatron.megatron.layout import layout_of
from opd_megatron.megatron.optimizer import gradient_norm
from opd_megatron.megatron.output_head import HIDDEN_MODES
from opd_megatron.megatron.state import LearnerState, build_state

_WARM_UP = 1
_TIMEOUT_S = 300.0
# Functions that megatron/step.py calls, by the stage they belong to.
_STAGES = {
    "pack_for_rank": "read and pack",
    "run_micro_batches": "forward and backward",
    "gradient_norm": "reduce and norm",
    "apply_gradients": "optimizer",
}


@contextmanager
def clocks(state: LearnerState, device: str) -> Iterator[Clocked]:
    """Put clocks around what the step calls, and around Megatron's gradient reduction."""
    clocked = Clocked(device)
    before = {name: getattr(step, name) for name in _STAGES}
    finalize = state.config.finalize_model_grads_func
    assert finalize is not None, "wrap_data_parallel sets it"
    try:
        for name in _STAGES:
            setattr(step, name, clocked.wrap(before[name], _STAGES[name]))
        state.config.finalize_model_grads_func = clocked.wrap(finalize, "reduce and norm")
        yield clocked
    finally:
        for name in _STAGES:
            setattr(step, name, before[name])
        state.config.finalize_model_grads_func = finalize


class Steps:
    """The two steps of one case."""

    def __init__(self, state: LearnerState, batch: Path, out: Path) -> None:
        self.state, self.batch, self.out = state, batch, out
        self.number = 0
        index = read_index(batch)
        micro_batches = pack_for_rank(
            index,
            lambda samples: read_batch(batch, samples),
            state.layout,
            state.groups,
            state.recipe.batch,
            state.arch.vocab_size,
        )
        self.num_microbatches = len(micro_batches)
        self.tokens_a_microbatch = micro_batches[0].num_tokens
        self.packed = [to_device(micro, state.groups, state.device) for micro in micro_batches]

    def ours(self) -> float:
        """Seconds of the optimizer's update in a whole `train` command."""
        self.state.optimizer_step = 0  # The same batch again, which version 0 wrote.
        command = {"kind": "train", "batch": str(self.batch), "out": str(self.out)}
        answer = run_command(self.state, command)
        assert answer["applied"], answer["why_not_applied"]
        return answer["timings"]["optimizer_s"]

    def bare(self) -> float:
        """Returns 0, the seconds of an optimizer that it does not have."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        state = self.state
        optimizer = state.require_loaded()
        for model in state.models:
            model.zero_grad_buffer()
        optimizer.zero_grad()

        def forward_step(batches: Iterator[DeviceMicroBatch], module: torch.nn.Module) -> Any:
            batch = next(batches)
            output = module(
                batch.tokens_BS,
                batch.position_ids_BS,
                None,
                labels=batch.target_ids_T[None],
                packed_seq_params=batch.documents,
            )
            mask_T = (batch.output_index_T >= 0).float()

            def loss(losses_1T: torch.Tensor) -> Any:
                loss_sum = (losses_1T[0].float() * mask_T).sum()
                return loss_sum, mask_T.sum().int(), {"loss": loss_sum.detach()}

            return output, loss

        with torch.enable_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(self.packed),
                model=state.models[0],
                num_microbatches=len(self.packed),
                seq_length=self.tokens_a_microbatch,
                micro_batch_size=1,
                forward_only=False,
            )
        gradient_norm(optimizer)
        return 0.0


def _seconds(call: Callable[[], float], device: str) -> float:
    """Wall seconds of a call on the slowest rank, without those that it returns."""
    dist.barrier()
    start = clock(device)
    left_out = call()
    spent = torch.tensor(clock(device) - start - left_out, dtype=torch.float64)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def measure_time(case: StepCase, work: Path) -> dict[str, Any]:
    """Seconds: our step and the bare one in turns, stages, publish, save."""
    state, steps, *_ = _loaded(case, work)
    device = case.device
    has_bare = case.learner.get("loss_mode") not in HIDDEN_MODES
    pairs: dict[str, list[float]] = {"ours": [], "bare": []}
    whole: list[float] = []
    for repeat in range(_WARM_UP + case.repeats):
        # Who is first changes, so that drift of the machine hits both alike.
        order = ("ours", "bare") if repeat % 2 else ("bare", "ours")
        for name in order if has_bare else ("ours",):
            spent = _seconds(getattr(steps, name), device)
            if repeat >= _WARM_UP:
                pairs[name].append(spent)
    stages: list[dict[str, float]] = []
    for _ in range(max(1, case.repeats // 2)):
        with clocks(state, device) as clocked:
            whole.append(_seconds(lambda: steps.ours() * 0.0, device))
        other = whole[-1] - sum(clocked.seconds.values())
        stages.append({**clocked.seconds, "other": other})
    publish = {"kind": "publish", "directory": str(work / "published"), "version": 1}
    publish_s = _seconds(lambda: _run(state, {**publish, "probe_tokens": []}), device)
    (work / "saved").mkdir(exist_ok=True)
    save_s = _seconds(
        lambda: _run(state, {"kind": "save", "directory": str(work / "saved")}), device
    )
    return {
        "ours_s": pairs["ours"],
        "bare_s": pairs["bare"],
        "step_s": whole,
        "stages_s": {name: median(s[name] for s in stages) for name in stages[0]},
        "publish_s": publish_s,
        "save_s": save_s,
        "num_microbatches": steps.num_microbatches,
    }


def _run(state: LearnerState, command: dict[str, Any]) -> float:
    run_command(state, command)
    return 0.0


def measure_memory(case: StepCase, work: Path) -> dict[str, Any]:
    """Bytes over the process before its model, at the highest moment of two steps, of every rank."""
    state, steps, baseline, code_before = _loaded(case, work)
    steps.packed = []
    give_back(case.device)
    reset_peak(case.device)
    for _ in range(2):
        steps.ours()
    # More of the libraries is in memory now than before; that is nobody's tensor.
    code = code_bytes(case.device) - code_before
    mine = {
        "stage": state.groups.pp.rank(),
        "bytes": peak_bytes(case.device) - baseline - code,
        "code_bytes": code,
        "baseline_bytes": baseline,
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {"ranks": ranks, "num_microbatches": steps.num_microbatches}


def _loaded(case: StepCase, work: Path) -> tuple[LearnerState, Steps, int, int]:
    """The learner with its weights, its steps, and the memory (all, code) of the process before the model."""
    recipe = case.recipe(work / "student")
    if case.device == "cpu":
        torch.set_num_threads(1)
        cpu_shim.install()
    parallel.start_process_group(case.device, _TIMEOUT_S)
    parallel.start_model_parallel(layout_of(recipe.learner), recipe.seed, _TIMEOUT_S)
    give_back(case.device)
    baseline, code = resident_bytes(case.device), code_bytes(case.device)
    state = build_state(recipe)
    state.load_hf(work / "student")
    return (
        state,
        Steps(state, work / "batch.safetensors", work / "values.safetensors"),
        baseline,
        code,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--measure", choices=("time", "memory"), required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    case = StepCase.from_json(arguments.case)
    measure = measure_time if arguments.measure == "time" else measure_memory
    begin = time.perf_counter()
    result = measure(case, arguments.work) | {"worker_s": time.perf_counter() - begin}
    if dist.get_rank() == 0:
        (arguments.work / f"{arguments.measure}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
