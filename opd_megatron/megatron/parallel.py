"""Process groups: one place that starts torch.distributed and Megatron's model-parallel groups.

Rank order is Megatron's default "tp-cp-ep-dp-pp", so global rank 0 is rank 0 of every group.
"""

from __future__ import annotations

import datetime
import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from opd_megatron.errors import ConfigError
from opd_megatron.megatron.layout import Layout


def start_process_group(device: str, timeout_s: float) -> None:
    """Join the torchrun world; every collective on it is bounded by `timeout_s`."""
    if device == "cpu":
        # The host name may resolve to an interface that a container does not have. On several nodes loopback is wrong.
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "gloo"
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def start_model_parallel(layout: Layout, seed: int, timeout_s: float) -> None:
    """Build Megatron's groups for `layout` and seed its generators; replaces groups built before.

    Raises:
        ConfigError: the world has another number of ranks than the layout needs.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    needed = layout.tp * layout.pp * layout.cp * layout.dp
    if dist.get_world_size() != needed:
        raise ConfigError.of(
            "learner world size",
            dist.get_world_size(),
            f"the layout {layout} needs {needed} ranks",
            "start torchrun with that many processes",
        )
    _end_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _end_groups() -> None:
    """Megatron forgets its groups without ending them; each keeps threads and sockets of its own."""
    if not parallel_state.model_parallel_is_initialized():
        return
    # Ranks outside a group hold a placeholder instead.
    known = getattr(parallel_state, "_global_process_group_list") or []  # noqa: B009
    groups = {id(group): group for group in known if isinstance(group, dist.ProcessGroup)}
    for group in groups.values():
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()  # models and buffers hold the groups, in cycles


@dataclass(frozen=True)
class Groups:
    """The groups the step talks over, and this rank's place in them."""

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def tp_or_none(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group, None where the vocabulary is whole."""
        return self.tp if self.tp.size() > 1 else None


def _is_member(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup)
    return group


def current_groups() -> Groups:
    """The groups of the current model-parallel initialisation."""
    return Groups(
        tp=_is_member(parallel_state.get_tensor_model_parallel_group()),
        pp=_is_member(parallel_state.get_pipeline_model_parallel_group()),
        cp=_is_member(parallel_state.get_context_parallel_group()),
        dp=_is_member(parallel_state.get_data_parallel_group()),
        dp_cp=_is_member(parallel_state.get_data_parallel_group(with_context_parallel=True)),
    )
