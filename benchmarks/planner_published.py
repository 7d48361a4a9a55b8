"""Published figures beside what the planner's model says of the same setting. Nothing here was measured by us.

Learner: training throughput of Llama 3 in Megatron-Bridge, which tests the count of operations, since the FLOP/s of
three of these rows are the table's own. Steps: the raw logs of "On-Policy Distillation Adventures" (Qwen3-4B-Base under
Qwen3-4B, 2,048 responses a step, verl, all roles on the same GPUs one after the other). Their device is not stated in
the logs; four GB200 GPUs are inferred from tokens / (seconds x tokens/s of a GPU) and from the site's "GB200 clusters".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe, ServerConfig, StudentConfig
from opd_megatron.launch.planner.hardware import DEVICES
from opd_megatron.launch.planner.stages import Lengths, Models, learner_s, rollout_s
from opd_megatron.launch.planner.work import training_flops
from opd_megatron.megatron.architecture import Architecture, architecture_of
from opd_megatron.megatron.known_models import PUBLISHED

_BRIDGE = "[Megatron-Bridge 25.11](https://docs.nvidia.com/nemo/megatron-bridge/latest/performance-summary-archive.html)"
_LOGS = "[run_data](https://github.com/Andrewzh112/Andrewzh112.github.io/tree/master/build/opd_adventures/data/run_data)"


@dataclass(frozen=True)
class Published:
    """One figure and the model's."""

    what: str
    measured: float
    unit: str
    predicted: float
    source: str


def _architecture(name: str) -> Architecture:
    return architecture_of(PUBLISHED[name][0], name)


# config.json of https://huggingface.co/meta-llama/Meta-Llama-3-70B
_LLAMA_70B = replace(
    _architecture("Llama-3-8B"), hidden_size=8192, ffn_size=28672, num_layers=80, num_heads=64
)


def _training(what: str, arch: Architecture, reached: float, measured: float) -> Published:
    tokens = reached / training_flops(arch, 8192 / 2, recompute=False)
    return Published(f"{what}, tokens/s of a GPU at 8,192", measured, "tokens/s", tokens, _BRIDGE)


# (run, step, mean response, tokens of the step, seconds of generation, seconds of the update)
_STEPS = (
    ("vanilla", "step 1", 1281, 187.3, 99.1),
    ("vanilla", "step 4", 5620, 885.8, 270.9),
    ("vanilla", "last step", 8181, 1329.0, 375.0),
    ("16k response", "last step", 15920, 3150.0, 910.0),
)


def _steps() -> list[Published]:
    student = _architecture("Qwen3-4B")
    device = DEVICES["gb200"]
    found: list[Published] = []
    for run, step, response, generate_s, update_s in _STEPS:
        lengths = Lengths(95, response)
        # Generation reserves a part of the GPU, as verl's default does.
        server = ServerConfig(num_servers=4, mem_fraction_static=0.5)
        spent, _ = rollout_s(student, server, device, 2048, lengths)
        recipe = change(
            Recipe(student=StudentConfig(path="Qwen/Qwen3-4B-Base")),
            {
                "learner.data_parallel": 4,
                "learner.recompute": True,
                "batch.tokens_per_microbatch": 32768,
            },
        )
        update = learner_s(recipe, Models(student, {}), device, 2048, lengths)
        where = f"{run}, {step}, {response:,} tokens"
        found.append(Published(f"{where}: generation", generate_s, "s", spent, _LOGS))
        found.append(Published(f"{where}: update", update_s, "s", update, _LOGS))
    return found


def published() -> list[Published]:
    """Every figure."""
    llama = _architecture("Llama-3-8B")
    return [
        _training("Llama 3 8B, H100, FP8", llama, 744e12, 14451),
        _training("Llama 3 8B, GB200, FP8", llama, 1622e12, 31508),
        _training("Llama 3 8B, GB200, MXFP8", llama, 1533e12, 29789),
        _training("Llama 3 70B, H100, FP8", _LLAMA_70B, 719e12, 1602),
        _training("Llama 3 70B, GB200, FP8", _LLAMA_70B, 1937e12, 4312),
        *_steps(),
    ]
