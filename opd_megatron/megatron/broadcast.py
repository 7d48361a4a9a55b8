"""Weights from the learner's ranks to the rollout servers, in buckets, through rank 0.

    open_group   a meeting point for rank 0 and the servers
    join_group   rank 0 joins the group while the controller has the servers join it
    send         every bucket, while the controller has the servers receive it
    close_group  the end of the group

These are mailbox commands, run on every rank. When a server lets the group down, join_group and
send answer `failed` with the reason, and the learner goes on with the next command; the group is
broken then, so that no server waits in it.

`hf.stream` brings one tensor after the other to rank 0, which copies it into a flat buffer and
broadcasts the buffer when the next tensor would not fit (`server_group.py`). Rank 0 holds that one
buffer, and while a tensor is gathered its parts, besides its own shard. The buckets follow from the
model's shapes alone, so the servers can be told before anything is sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.errors import ContractError
from opd_megatron.megatron import hf
from opd_megatron.megatron.buckets import BucketPlan, filled_buckets, plan_buckets
from opd_megatron.megatron.hf_names import hf_shapes
from opd_megatron.megatron.server_group import GroupBroken, Limit, ServerGroup, address_towards
from opd_megatron.megatron.state import LearnerState

Command = dict[str, Any]
Result = dict[str, Any]


def _dtype(state: LearnerState) -> torch.dtype:
    return state.modules[0].config.params_dtype


def _buckets(state: LearnerState, bucket_bytes: int) -> list[BucketPlan]:
    return plan_buckets(hf_shapes(state.arch), _dtype(state), bucket_bytes)


def describe_buckets(state: LearnerState, bucket_bytes: int) -> Result:
    """What the servers must be told, and the step that the weights are of."""
    buckets = [
        {"names": [name for name, _ in b.tensors], "shapes": [shape for _, shape in b.tensors]}
        for b in _buckets(state, bucket_bytes)
    ]
    return {
        "dtype": str(_dtype(state)).removeprefix("torch."),
        "buckets": buckets,
        "optimizer_step": state.optimizer_step,
    }


def open_group(state: LearnerState, command: Command) -> Result:
    close_group(state, command)
    if dist.get_rank() != 0:
        return {}
    group = state.server_group = ServerGroup(address_towards(*command["server"]), state.device)
    return {"host": group.host, "port": group.port}


def join_group(state: LearnerState, command: Command) -> Result:
    if dist.get_rank() != 0:
        return {}
    try:
        _open(state).join(command["name"], command["world_size"], Limit.of(command))
    except GroupBroken as error:
        return {"failed": str(error)}
    return {"failed": None}


def send_weights(state: LearnerState, command: Command) -> Result:
    state.require_weights()
    if state.optimizer_step != command["optimizer_step"]:
        # A server came back while the learner trained: the version that it was to get is gone.
        # The servers wait for it already; the end of the group ends that.
        close_group(state, command)
        why = f"the learner is at step {state.optimizer_step}, offered was {command['optimizer_step']}"
        return {"failed": why}
    tensors = hf.stream(state.modules, state.arch, state.groups, to_cpu=False)
    if dist.get_rank() != 0:
        for _ in tensors:
            raise AssertionError("only rank 0 receives tensors")
        return {}
    buckets, limit, failed = _buckets(state, command["bucket_bytes"]), Limit.of(command), None
    try:
        for flat in filled_buckets(buckets, tensors, _dtype(state), state.device):
            _open(state).broadcast(flat, limit)
    except GroupBroken as error:
        failed = str(error)
    # To the end in any case: the other ranks stand in its collectives.
    for _ in tensors:
        pass
    return {"failed": failed}


def close_group(state: LearnerState, command: Command) -> Result:
    if state.server_group is not None:
        state.server_group.close()
        state.server_group = None
    return {}


def _open(state: LearnerState) -> ServerGroup:
    if state.server_group is None:
        raise ContractError("the learner has no group with the servers; send `open_group` first")
    return state.server_group
