"""Peak memory of a learner rank, in terms that a layout or a setting changes. No torch, no files.

    weights      parameters of the stage / tp, at the precision's bytes
    gradients    4 bytes a parameter: Megatron accumulates in float32
    optimizer    AdamW's two moments in float32 (8), and a float32 master copy (4) beside bf16 weights;
                 divided by dp * cp under the distributed optimizer
    activations  what the layers keep (activation_memory.py) times the micro-batches in flight
    logits       of the last stage, by `learner.loss_mode`
    workspace    what only the moment of the peak needs

The peak is the largest of three moments: the loss (all activations, the logits, and a gradient of the output weight
that was not added to the float32 one yet), the backward of a layer (recomputed or not), the optimizer. In flight on
stage i of p with m micro-batches: min(m, p - i) under 1F1B; under the interleaved schedule with v chunks a stage,
2 (p - i - 1) + (v - 1) p + 1 chunks (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). Full recomputation keeps
the input of each layer, h / s a token, and one layer's activations at a time (Korthikanti et al. 2022, section 5).

A micro-batch is counted as full, `batch.tokens_per_microbatch`, so this is an upper bound for short ones.

Left out: the framework itself (CUDA context, NCCL, allocator fragmentation), in-process teachers, buffers of
checkpoints and of weight publishing, FP8's workspaces. On a GPU none of this was compared with a measurement; on a CPU
benchmarks/step.py does that (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.launch.activation_memory import (
    element_bytes,
    key_width,
    layer_bytes_per_token,
    query_width,
)
from opd_megatron.megatron.architecture import Architecture

_FLOAT32 = 4
# Of the modes that never store the logits: bytes of a chunk's logits (losses/fused/head.py).
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# Float32 copies of a block of rows that the plain row functions work on (losses/fused/rows_torch.py).
_ROW_WORKSPACE_BYTES = {"cpu": 3 * (4 << 20), "cuda": 0}
# An eager AdamW step on a CPU makes two temporaries of the largest parameter's size; fused ones make none.
_OPTIMIZER_TEMPORARIES = {"cpu": 2, "cuda": 0}


@dataclass(frozen=True)
class Batch:
    """What of the batch matters: tokens of a micro-batch over all context-parallel ranks, and how many there are."""

    tokens_per_microbatch: int
    num_microbatches: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage at its peak; `peak` names the moment."""

    stage: int
    peak: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by term; they add up to `total`."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("stage", "peak")
        }

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def layer_parameters(arch: Architecture, tensor_parallel: int) -> int:
    """Parameters of one layer on one rank."""
    h, q, k = arch.hidden_size, query_width(arch), key_width(arch)
    sharded = h * (q + 2 * k) + q * h + 3 * h * arch.ffn_size
    if arch.family.qkv_bias:
        sharded += q + 2 * k
    norms = 2 * h + (2 * arch.head_size if arch.family.query_key_norm else 0)
    return sharded // tensor_parallel + norms


def stage_parameters(arch: Architecture, learner: LearnerConfig, stage: int) -> int:
    """Parameters of one rank of a stage. Tied embeddings are held by the first and by the last stage."""
    tp, pp = learner.tensor_parallel, learner.pipeline_parallel
    table = arch.padded_vocab_size * arch.hidden_size // tp
    first, last = stage == 0, stage == pp - 1
    found = arch.num_layers // pp * layer_parameters(arch, tp)
    found += table if first else 0
    if last:
        found += arch.hidden_size
        found += 0 if arch.tied_embeddings and first else table
    return found


def layers_in_flight(arch: Architecture, learner: LearnerConfig, stage: int, micro: int) -> int:
    """Layers whose activations a stage holds at once, counted once for every micro-batch."""
    pp, vpp = learner.pipeline_parallel, learner.virtual_pipeline
    per_chunk = arch.num_layers // (pp * vpp)
    chunks = pp - stage if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    return per_chunk * min(chunks, micro * vpp)


def _optimizer_bytes(parameters: int, learner: LearnerConfig) -> int:
    each = 2 * _FLOAT32 + (_FLOAT32 if learner.precision != "fp32" else 0)
    shards = learner.data_parallel * learner.context_parallel
    return each * parameters // (shards if learner.distributed_optimizer else 1)


def logits_bytes(arch: Architecture, learner: LearnerConfig, tokens: int, device: str) -> int:
    """Logits, their gradient where it has a storage of its own, and what computes the rows."""
    vocab, b = arch.padded_vocab_size // learner.tensor_parallel, element_bytes(learner)
    logits = b * tokens * vocab
    if learner.loss_mode == "in_place":
        return logits + _ROW_WORKSPACE_BYTES[device]
    if learner.loss_mode == "stored":
        return 2 * logits + _ROW_WORKSPACE_BYTES[device]
    hidden_gradient = b * tokens * arch.hidden_size
    return min(logits, _CHUNK_BYTES[device]) + _ROW_WORKSPACE_BYTES[device] + hidden_gradient


def estimate_stage(
    arch: Architecture, learner: LearnerConfig, batch: Batch, device: str, stage: int
) -> StageMemory:
    """The peak of one rank of a stage.

    Args:
        device: "cuda" counts Transformer Engine's fused layers, "cpu" the eager ones.
        stage: of the pipeline, from 0.
    """
    tp, b = learner.tensor_parallel, element_bytes(learner)
    tokens = -(-batch.tokens_per_microbatch // learner.context_parallel)
    parameters = stage_parameters(arch, learner, stage)
    last = stage == learner.pipeline_parallel - 1
    state = {
        "weights": (b + (2 if learner.precision == "fp8" else 0)) * parameters,
        "gradients": _FLOAT32 * parameters,
        "optimizer": _optimizer_bytes(parameters, learner),
    }
    per_layer = tokens * layer_bytes_per_token(arch, learner, device)
    stream = b * tokens * arch.hidden_size // (tp if learner.sequence_parallel else 1)
    layers = layers_in_flight(arch, learner, stage, batch.num_microbatches)
    kept = layers * (stream if learner.recompute else per_layer)
    # The final norm's input, output and, eager, its normalized tensor; or the output that is sent on.
    kept += (stream * (2 if device == "cuda" else 3)) if last else stream
    # Gradients of a layer's widest tensors: the gate's input and output, the residual stream twice.
    backward = b * tokens * 3 * arch.ffn_size // tp + 2 * stream
    moments = {"backward": (int(kept), 0, int(backward + (per_layer if learner.recompute else 0)))}
    table = arch.padded_vocab_size * arch.hidden_size // tp
    if last:
        hidden_modes = learner.loss_mode in ("chunked", "recompute")
        workspace = stream + (0 if hidden_modes else b * table)
        logits = logits_bytes(arch, learner, tokens, device)
        moments["loss"] = (int(kept), logits, int(workspace))
    largest = max(table if stage == 0 or last else 0, 2 * arch.hidden_size * arch.ffn_size // tp)
    if learner.distributed_optimizer:
        largest = min(largest, parameters // (learner.data_parallel * learner.context_parallel))
    moments["optimizer"] = (0, 0, _OPTIMIZER_TEMPORARIES[device] * _FLOAT32 * largest)
    peak = max(moments, key=lambda name: sum(moments[name]))
    activations, logits, workspace = moments[peak]
    return StageMemory(
        stage, peak, **state, activations=activations, logits=logits, workspace=workspace
    )


def estimate_learner(
    arch: Architecture, learner: LearnerConfig, batch: Batch, device: str
) -> tuple[StageMemory, ...]:
    """Every pipeline stage; all tensor-, context- and data-parallel ranks of a stage need the same."""
    stages = range(learner.pipeline_parallel)
    return tuple(estimate_stage(arch, learner, batch, device, stage) for stage in stages)
