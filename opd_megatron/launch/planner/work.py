"""Operations and bytes of one token, from a model's sizes.

    forward    2 (layers' weights + h V) + 4 c q n      FLOP; c tokens of context, q width of queries, n layers
    backward   twice the forward; full recomputation adds one forward of the layers
    KV cache   2 n k b                                  bytes a token; k width of keys, b bytes an element
    decoding   (weights + B c KV) / B                   bytes read for each of B tokens

A causal sequence of L tokens has a mean context of L / 2. Embeddings cost nothing; norms, rotation and softmax are
left out. After "Scaling Laws for Neural Language Models" (Kaplan et al. 2020, arXiv 2001.08361, table 1).
"""

from __future__ import annotations

from opd_megatron.launch.activation_memory import key_width, query_width
from opd_megatron.launch.estimate_memory import layer_parameters
from opd_megatron.megatron.architecture import Architecture


def layer_weights(arch: Architecture) -> int:
    """Parameters of all layers."""
    return arch.num_layers * layer_parameters(arch, 1)


def parameters(arch: Architecture) -> int:
    """Of the whole model; a tied head counts once."""
    tables = 1 if arch.tied_embeddings else 2
    return layer_weights(arch) + arch.hidden_size * (1 + tables * arch.padded_vocab_size)


def layers_flops(arch: Architecture, context: float) -> float:
    """Forward of all layers for one token."""
    attention = 4.0 * context * query_width(arch) * arch.num_layers
    return 2.0 * layer_weights(arch) + attention


def forward_flops(arch: Architecture, context: float) -> float:
    """Forward of one token, output head included."""
    return layers_flops(arch, context) + 2.0 * arch.hidden_size * arch.padded_vocab_size


def training_flops(arch: Architecture, context: float, recompute: bool) -> float:
    """Forward and backward of one token."""
    again = layers_flops(arch, context) if recompute else 0.0
    return 3.0 * forward_flops(arch, context) + again


def kv_bytes(arch: Architecture, element_bytes: int) -> int:
    """Keys and values of one token."""
    return 2 * arch.num_layers * key_width(arch) * element_bytes
