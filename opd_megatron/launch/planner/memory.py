"""Bytes of a GPU by role, and whether they fit.

Learner: `launch/estimate_memory.py`, the weights of teachers inside it, and an allowance for the framework.
Server: SGLang keeps `mem_fraction_static` of the GPU for weights and KV cache; the cache gets what the weights leave.
The rest is for CUDA graphs, activations and log-probs: a teacher turns the rows of a chunk of prefill into float32
log-probs over the whole vocabulary, a rollout server those of its running sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.schema import Recipe, ServerConfig
from opd_megatron.errors import ConfigError
from opd_megatron.launch.activation_memory import element_bytes
from opd_megatron.launch.estimate_memory import Batch, estimate_learner, stage_parameters
from opd_megatron.launch.planner.hardware import FRAMEWORK_BYTES, GRAPH_BYTES, Device
from opd_megatron.launch.planner.work import kv_bytes, parameters
from opd_megatron.megatron.architecture import Architecture

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_FLOAT32 = 4
# Rows of a chunk of prefill (SGLang's default on large GPUs).
_PREFILL_ROWS = 8192
# Sequences that a server decodes at once, at most (an assumption; SGLang derives it from memory).
MAX_RUNNING = 1024
GIB = float(1 << 30)


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one GPU of a role by term. `note` says of which moment or part."""

    role: str
    note: str
    terms: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def server_bytes(server: ServerConfig) -> int:
    """Bytes of an element of weights and cache."""
    return _ELEMENT_BYTES[server.dtype]


def cache_tokens(arch: Architecture, server: ServerConfig, device: Device) -> int:
    """Tokens that the KV cache of one server holds; negative where the weights alone do not fit."""
    element = server_bytes(server)
    static = server.mem_fraction_static * device.memory * server.tensor_parallel
    found = int((static - element * parameters(arch)) // kv_bytes(arch, element))
    return min(found, server.max_total_tokens) if server.max_total_tokens else found


def learner_memory(
    recipe: Recipe,
    student: Architecture,
    teachers: dict[str, Architecture],
    microbatches: int,
) -> list[RoleMemory]:
    """Every pipeline stage of the learner. `teachers`: those inside it."""
    batch = Batch(recipe.batch.tokens_per_microbatch, microbatches)
    found: list[RoleMemory] = []
    for stage in estimate_learner(student, recipe.learner, batch, recipe.device):
        held = sum(
            element_bytes(recipe.learner) * stage_parameters(t, recipe.learner, stage.stage)
            for t in teachers.values()
        )
        terms = {name: float(size) for name, size in stage.terms.items()}
        terms |= {"teachers inside": float(held)} if teachers else {}
        terms |= {"framework": float(FRAMEWORK_BYTES)} if recipe.device == "cuda" else {}
        found.append(RoleMemory("learner", f"stage {stage.stage}, {stage.peak}", terms))
    return found


def server_memory(
    role: str, arch: Architecture, server: ServerConfig, device: Device, sequences: float
) -> RoleMemory:
    """One GPU of a server. `sequences`: that it works on at once."""
    tp, element = server.tensor_parallel, server_bytes(server)
    tokens = cache_tokens(arch, server, device)
    rows = sequences if role == "rollout" else min(_PREFILL_ROWS, server.context_length)
    terms = {
        "weights": element * parameters(arch) / tp,
        "KV cache": float(max(0, tokens) * kv_bytes(arch, element) / tp),
        **({} if device.is_cpu else {"CUDA graphs": float(GRAPH_BYTES)}),
        "log-probs": float(_FLOAT32 * rows * arch.padded_vocab_size),
    }
    return RoleMemory(role, f"cache of {max(0, tokens):,} tokens a server", terms)


def check_server(
    role: str, key: str, arch: Architecture, server: ServerConfig, device: Device, longest: int
) -> None:
    """
    Raises:
        ConfigError: the weights leave no room for the cache of the longest sample.
    """
    tokens = cache_tokens(arch, server, device)
    if tokens >= longest:
        return
    weights = server_bytes(server) * parameters(arch) / server.tensor_parallel / GIB
    cache = longest * kv_bytes(arch, server_bytes(server)) / server.tensor_parallel / GIB
    static = server.mem_fraction_static * device.memory / GIB
    term = "weights" if weights > static else "KV cache"
    raise ConfigError.of(
        f"{key}.tensor_parallel",
        server.tensor_parallel,
        f"{role} does not fit: {term}: weights of {weights:.1f} GiB and {cache:.1f} GiB of cache for one sample of "
        f"{longest} tokens, in {static:.1f} GiB ({server.mem_fraction_static:g} of a {device.name})",
        f"raise {key}.tensor_parallel",
    )


def check_fits(memory: RoleMemory, device: Device) -> None:
    """
    Raises:
        ConfigError: the role needs more than the GPU has; names the largest term.
    """
    if memory.total <= device.memory:
        return
    name, size = max(memory.terms.items(), key=lambda item: item[1])
    fixes = {
        "activations": "set learner.recompute=true, or lower batch.tokens_per_microbatch",
        "logits": "set learner.loss_mode=chunked, or raise learner.tensor_parallel",
        "optimizer": "set learner.distributed_optimizer=true, or raise learner.data_parallel",
        "KV cache": "lower mem_fraction_static of the server",
        "log-probs": "lower mem_fraction_static of the server",
    }
    raise ConfigError(
        f"{memory.role} ({memory.note}) does not fit: it needs {memory.total / GIB:.1f} GiB of the "
        f"{device.memory / GIB:.1f} GiB of a {device.name}; the largest term is {name} with {size / GIB:.1f} GiB; "
        f"{fixes.get(name, 'raise learner.tensor_parallel or learner.pipeline_parallel')}"
    )
