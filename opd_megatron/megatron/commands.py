"""What each mailbox command does. Every rank runs the same function; rank 0's result is sent.

load         weights from a Hugging Face directory (fresh optimizer), or a checkpoint, or its weights alone
score        log-probs and entropies of a batch, written to a file
compare      both KLs between the student and the teachers inside the learner, written to a file
train        one optimizer step on a batch; per-token values written to a file
publish      a Hugging Face directory of the weights, and probe log-probs
offer        which buckets the weights make, and probe log-probs; then, with the rollout servers,
             open_group, join_group, send, close_group: see broadcast.py
save         a checkpoint into an empty directory
begin_save   the same in the background: answered when the state was copied
finish_save  complete it; `files` is null while some rank still writes, then ask again
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors

from opd_megatron.atomic import write_bytes
from opd_megatron.errors import ContractError
from opd_megatron.exchange.batch_file import (
    BatchIndex,
    BatchSlice,
    read_batch,
    read_index,
    read_whole,
)
from opd_megatron.exchange.staleness import check_staleness
from opd_megatron.losses.settings import LossSettings
from opd_megatron.megatron import checkpoint
from opd_megatron.megatron.broadcast import (
    close_group,
    describe_buckets,
    join_group,
    open_group,
    send_weights,
)
from opd_megatron.megatron.compare import compare
from opd_megatron.megatron.publish import publish
from opd_megatron.megatron.state import LearnerState
from opd_megatron.megatron.step import entropy_of_rows, score, train

Command = dict[str, Any]
Result = dict[str, Any]


def _write_values(path: Path, values: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        write_bytes(path, to_safetensors(values), durable=False)


def _reader(path: Path) -> Callable[[Sequence[int]], BatchSlice]:
    return lambda samples: read_batch(path, samples)


def load(state: LearnerState, command: Command) -> Result:
    path = Path(command["path"])
    if command["source"] == "hf":
        state.load_hf(path)
    elif command["source"] == "commit":
        checkpoint.load(state, path)
    elif command["source"] == "weights":
        checkpoint.load_weights(state, path)
    else:
        raise ContractError(
            f"load: source {command['source']!r} is not 'hf', 'commit' or 'weights'"
        )
    return {"parameters": state.num_parameters, "optimizer_step": state.optimizer_step}


def score_batch(state: LearnerState, command: Command) -> Result:
    batch = Path(command["batch"])
    index = read_index(batch)
    values = score(state, index, _reader(batch), state.recipe.rollout.temperature)
    _write_values(Path(command["out"]), values)
    return {"tokens": index.num_response_tokens}


def compare_batch(state: LearnerState, command: Command) -> Result:
    batch = Path(command["batch"])
    index = read_index(batch)
    _write_values(Path(command["out"]), compare(state, index, _reader(batch)))
    return {"tokens": index.num_response_tokens}


def train_batch(state: LearnerState, command: Command) -> Result:
    batch = Path(command["batch"])
    index = read_index(batch)
    check_staleness(index, state.optimizer_step, state.recipe.max_staleness)
    has_topk = LossSettings.of(state.recipe).teacher_topk > 0
    whole = read_whole(batch, entropy_of=entropy_of_rows if has_topk else None)
    result = train(state, index, _reader(batch), whole)
    _write_values(Path(command["out"]), result.values)
    return {
        # A second update that was refused leaves the first one standing: the batch was trained on.
        "applied": result.updates > 0,
        "why_not_applied": result.why_not_applied,
        "metrics": result.metrics,
        "timings": result.timings,
    }


def _probe_batch(probe_tokens: list[list[int]]) -> tuple[BatchIndex, BatchSlice]:
    """Probes as samples with a one-token prompt: the log-prob of every token after the first."""
    tokens = tuple(np.asarray(ids, dtype=np.int32) for ids in probe_tokens)
    responses = [len(ids) - 1 for ids in tokens]
    zeros = tuple(np.zeros(n, dtype=np.float32) for n in responses)
    ids = tuple(f"probe-{i}" for i in range(len(tokens)))
    index = BatchIndex(
        step=0,
        weight_version=0,
        sample_ids=ids,
        sample_offsets=np.cumsum([0, *(len(t) for t in tokens)], dtype=np.int64),
        prompt_lengths=np.ones(len(tokens), dtype=np.int64),
        response_offsets=np.cumsum([0, *responses], dtype=np.int64),
        token_versions=np.zeros(sum(responses), dtype=np.int32),
        teachers=("",) * len(tokens),
    )
    batch = BatchSlice(
        step=0,
        weight_version=0,
        num_samples=len(tokens),
        indices=tuple(range(len(tokens))),
        sample_ids=ids,
        tokens=tokens,
        prompt_lengths=tuple(1 for _ in tokens),
        behavior_logprobs=zeros,
        teacher_logprobs=zeros,
        topk_ids=None,
        topk_logprobs=None,
    )
    return index, batch


def _probe_logprobs(state: LearnerState, probe_tokens: list[list[int]]) -> list[list[float]]:
    if not probe_tokens:
        return []
    index, batch = _probe_batch(probe_tokens)
    flat = score(state, index, lambda _: batch, temperature=1.0)["student_logprobs"].tolist()
    return [flat[a:b] for a, b in itertools.pairwise(index.response_offsets.tolist())]


def publish_weights(state: LearnerState, command: Command) -> Result:
    state.require_weights()
    probe_logprobs = _probe_logprobs(state, command["probe_tokens"])
    size, tensors = publish(
        state.modules,
        state.arch,
        state.groups,
        Path(state.recipe.student.path),
        Path(command["directory"]),
        command["version"],
        state.mark,
    )
    return {"bytes": size, "tensors": tensors, "probe_logprobs": probe_logprobs}


def offer_weights(state: LearnerState, command: Command) -> Result:
    state.require_weights()
    probe_logprobs = _probe_logprobs(state, command["probe_tokens"])
    described = describe_buckets(state, command["bucket_bytes"])
    return {**described, "probe_logprobs": probe_logprobs}


def save_checkpoint(state: LearnerState, command: Command) -> Result:
    return {"files": checkpoint.save(state, Path(command["directory"]))}


def begin_save(state: LearnerState, command: Command) -> Result:
    checkpoint.begin(state, Path(command["directory"]))
    return {}


def finish_save(state: LearnerState, command: Command) -> Result:
    return {"files": checkpoint.finish(state)}


COMMANDS: dict[str, Callable[[LearnerState, Command], Result]] = {
    "load": load,
    "score": score_batch,
    "compare": compare_batch,
    "train": train_batch,
    "publish": publish_weights,
    "offer": offer_weights,
    "open_group": open_group,
    "join_group": join_group,
    "send": send_weights,
    "close_group": close_group,
    "save": save_checkpoint,
    "begin_save": begin_save,
    "finish_save": finish_save,
}


def run_command(state: LearnerState, command: Command) -> Result:
    """Run one command.

    Raises:
        ContractError: an unknown kind or a missing argument.
        OpdError: whatever the command raises.
    """
    kind = command["kind"]
    if kind not in COMMANDS:
        raise ContractError(f"command {kind!r} is not one of {sorted(COMMANDS)} or 'stop'")
    return COMMANDS[kind](state, command)
