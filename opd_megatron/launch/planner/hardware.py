"""Accelerators, as their makers and published measurements describe them. One table; each number with its source.

Peaks are dense (no sparsity). What a learner reaches is a published training throughput, not a fraction of ours.

    H100 SXM     https://www.nvidia.com/en-us/data-center/h100/
    H200 SXM     https://www.nvidia.com/en-us/data-center/h200/
    GB200 NVL72  https://www.nvidia.com/en-us/data-center/gb200-nvl72/, its figures for 72 GPUs divided by 72
    capability   https://developer.nvidia.com/cuda-gpus

Learner: FP8 (current scaling) and MXFP8 from the performance summary of Megatron-Bridge, container 25.11, Llama 3 8B on
8 GPUs at 8,192 tokens (https://docs.nvidia.com/nemo/megatron-bridge/latest/performance-summary-archive.html). No bf16
figure of a dense model of this size is published there: 41 % of the peak is what Megatron-LM's README states for its
smallest model on H100 (https://github.com/NVIDIA/Megatron-LM); for GB200 that fraction is an assumption.

CPU: two cores of the machine of docs/planner.md's tables; two runs of the demo there give the six constants. They hold
for models as small as the demo's, where arithmetic takes no time beside the overheads; larger ones are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_megatron.errors import ConfigError, did_you_mean

_BF16_FRACTION = 0.41
CPU = "cpu"
# Arithmetic and memory of models this small never limit.
_FREE = 1e18
CPU_PARAMETERS = 10_000_000


@dataclass(frozen=True)
class Overheads:
    """Seconds that do not come from arithmetic or memory traffic. On GPUs they are inside `EFFICIENCY`.

    Args:
        decode_step_s: of one decoding step of a server.
        decode_sequence_s: of each sequence in it.
        prefill_s: of each response that a teacher scores.
        learner_step_s: of a step; learner_token_s: of each of its tokens.
        sync_s: of publishing and of handing over new weights.
    """

    decode_step_s: float = 0.0
    decode_sequence_s: float = 0.0
    prefill_s: float = 0.0
    learner_step_s: float = 0.0
    learner_token_s: float = 0.0
    sync_s: float = 0.0


@dataclass(frozen=True)
class Device:
    """One accelerator: FLOP/s, bytes, bytes/s. `training_flops`: reached by a learner, by precision.

    `capability`: of its kernels, as CUDA counts; None for a CPU.
    """

    name: str
    bf16_flops: float
    memory: float
    bandwidth: float
    nvlink: float
    gpus_per_node: int
    training_flops: dict[str, float]
    overheads: Overheads = field(default_factory=Overheads)
    capability: tuple[int, int] | None = None

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU


DEVICES = {
    "h100": Device(
        "h100",
        bf16_flops=989e12,
        memory=80e9,
        bandwidth=3.35e12,
        nvlink=900e9,
        gpus_per_node=8,
        training_flops={"bf16": _BF16_FRACTION * 989e12, "fp8": 744e12},
        capability=(9, 0),
    ),
    "h200": Device(
        "h200",
        bf16_flops=989e12,
        memory=141e9,
        bandwidth=4.8e12,
        nvlink=900e9,
        gpus_per_node=8,
        training_flops={"bf16": _BF16_FRACTION * 989e12, "fp8": 744e12},
        capability=(9, 0),
    ),
    "gb200": Device(
        "gb200",
        bf16_flops=2.5e15,
        memory=186e9,
        bandwidth=8e12,
        nvlink=1.8e12,
        gpus_per_node=4,
        training_flops={"bf16": _BF16_FRACTION * 2.5e15, "fp8": 1622e12, "mxfp8": 1533e12},
        capability=(10, 0),
    ),
    CPU: Device(
        CPU,
        bf16_flops=_FREE,
        memory=_FREE,
        bandwidth=_FREE,
        nvlink=_FREE,
        gpus_per_node=1,
        training_flops={"bf16": _FREE},
        overheads=Overheads(
            decode_step_s=3.6e-3,
            decode_sequence_s=1.5e-4,
            prefill_s=1.0e-3,
            learner_step_s=3.5e-2,
            learner_token_s=2.7e-5,
            sync_s=6.1e-2,
        ),
    ),
}


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the peaks that serving reaches: assumptions, to be replaced by measurements of one's own.

    `decode`: of the memory bandwidth. `prefill`: of the bf16 peak. 8 GB/s is what a plain broadcast of weights reaches
    over InfiniBand (https://github.com/verl-project/verl, checkpoint engine, 32 H100); the disk route writes and reads
    once, at a rate that is the file system's own and here an assumption.
    """

    decode: float = 0.65
    prefill: float = 0.55
    broadcast_bytes_s: float = 8e9
    disk_bytes_s: float = 2e9


EFFICIENCY = Efficiency()

# Bytes of a GPU that no term counts: CUDA context, NCCL buffers, fragmentation. An assumption.
FRAMEWORK_BYTES = 3 << 30
# What a server's CUDA graphs take. An assumption.
GRAPH_BYTES = 2 << 30


def device_named(name: str) -> Device:
    """
    Raises:
        ConfigError: no such device in the table.
    """
    if name not in DEVICES:
        raise ConfigError.of(
            "--hardware",
            name,
            f"not in the table of devices{did_you_mean(name, DEVICES)}",
            f"say one of {', '.join(DEVICES)}",
        )
    return DEVICES[name]
