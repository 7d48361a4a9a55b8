"""Bytes that one packed token leaves behind in one transformer layer until its backward.

What each operator keeps for its backward is counted as in "Reducing Activation Recomputation in Large Transformer
Models" (Korthikanti et al. 2022, arXiv 2205.05198, section 4), for the layers built here: RMSNorm, grouped-query
attention by a fused kernel (so no term in the square of the length, their section 4.1), SwiGLU, no dropout and so no
masks. With h hidden, q and k the width of queries and of keys (values are as wide), f the feed-forward width, t the
tensor-parallel size, s = t under sequence parallel and else 1, b bytes an element:

    fused (Transformer Engine)   b [ 4 h / s + (3 q + 3 k + 3 f) / t ] + 4 heads / t
        norms: input and output, twice (4 h); the joint projection's output (q + 2 k), which the query and key norms and
        the values keep; queries and keys after rotation (q + k); attention's output (q) and log-sum-exp; the gate's
        input (2 f) and output (f)

    CPU (megatron/cpu_layers.py)  b [ 6 h / s + (7 q + 3 k + 4 f) / t + 3 q / t (rho - 1) + ... ], see `_cpu`

Left out: what a kernel allocates and frees inside one operator; FP8's smaller inputs of linear layers, which the fused
count takes as bf16 (an upper bound). No torch.
"""

from __future__ import annotations

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.megatron.architecture import Architecture

# Documents are padded to the longest of their power of two on a CPU; this much on average.
CPU_PADDING = 1.2


def element_bytes(learner: LearnerConfig) -> int:
    """Of weights and activations outside FP8 kernels."""
    return 4 if learner.precision == "fp32" else 2


def query_width(arch: Architecture) -> int:
    return arch.num_heads * arch.head_size


def key_width(arch: Architecture) -> int:
    return arch.num_kv_heads * arch.head_size


def layer_bytes_per_token(arch: Architecture, learner: LearnerConfig, device: str) -> float:
    """Kept by one layer for one token of a rank, the layer's input included."""
    count = _fused if device == "cuda" else _cpu
    return count(arch, learner)


def _split(learner: LearnerConfig) -> tuple[int, int]:
    """(by what sharded activations are divided, by what those between the sharded parts are)."""
    tp = learner.tensor_parallel
    return tp, tp if learner.sequence_parallel else 1


def _fused(arch: Architecture, learner: LearnerConfig) -> float:
    tp, sp = _split(learner)
    q, k, f = query_width(arch), key_width(arch), arch.ffn_size
    elements = 4 * arch.hidden_size / sp + (3 * q + 3 * k + 3 * f) / tp
    return element_bytes(learner) * elements + 4 * arch.num_heads / tp


def _cpu(arch: Architecture, learner: LearnerConfig) -> float:
    """Eager operators keep more: a norm its input, the normalized and the weighted tensor; rotation its cosines and
    sines; attention padded copies of its inputs, keys and values as wide as the queries; SwiGLU the activated gate.
    """
    tp, sp = _split(learner)
    q, k, f = query_width(arch), key_width(arch), arch.ffn_size
    norms = 6 * arch.hidden_size / sp
    projection = q + 2 * k
    query_key_norm = (
        (2 * q + k) if arch.family.query_key_norm else 0
    )  # a copy of q; q and k normalized
    # Under context parallel every rank attends to all documents.
    attention = CPU_PADDING * learner.context_parallel * 4 * q + q
    elements = norms + (projection + query_key_norm + attention + 4 * f) / tp
    rotation = 4 * arch.head_size
    in_float32 = 0
    if learner.precision != "fp32":  # norms compute in float32 and keep that
        in_float32 = 4 * (4 * arch.hidden_size / sp + 2 * (q + k) / tp)
    return element_bytes(learner) * (elements + rotation) + in_float32
