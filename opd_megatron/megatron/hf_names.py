"""The one table of weight names: Hugging Face tensors, and where Megatron keeps them.

A `Unit` is one Megatron parameter and the Hugging Face tensors in it. `kind` says how they are cut
over tensor-parallel ranks:

    whole    replicated
    vocab    rows, padded to the padded vocabulary with zeros
    rows     rows of every tensor, then stacked (gate and up)
    columns  columns
    heads    rows of q, k, v by key/value group, interleaved as [group][q..., k, v][head size]

Families differ only in which units exist. Norms in front of a linear layer have another name in
Transformer Engine's fused layers; both names are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opd_megatron.megatron.architecture import Architecture

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Buffers that old exports wrote; nothing is learned in them.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Unit:
    """One Megatron parameter. `megatron`: candidate names, relative to `layer` when it is set."""

    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: str
    megatron: tuple[str, ...]
    layer: int | None = None


def _layer_units(arch: Architecture, layer: int) -> Iterator[Unit]:
    prefix = f"model.layers.{layer}."
    hidden, ffn, size = arch.hidden_size, arch.ffn_size, arch.head_size
    q_rows, kv_rows = arch.num_heads * size, arch.num_kv_heads * size

    def unit(kind: str, megatron: tuple[str, ...], **tensors: tuple[int, ...]) -> Unit:
        names = tuple(prefix + name.replace("__", ".") for name in tensors)
        return Unit(names, tuple(tensors.values()), kind, megatron, layer)

    attention = "self_attention."
    yield unit(
        "whole",
        ("input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"),
        input_layernorm__weight=(hidden,),
    )
    yield unit(
        "heads",
        (attention + "linear_qkv.weight",),
        self_attn__q_proj__weight=(q_rows, hidden),
        self_attn__k_proj__weight=(kv_rows, hidden),
        self_attn__v_proj__weight=(kv_rows, hidden),
    )
    if arch.family.qkv_bias:
        yield unit(
            "heads",
            (attention + "linear_qkv.bias",),
            self_attn__q_proj__bias=(q_rows,),
            self_attn__k_proj__bias=(kv_rows,),
            self_attn__v_proj__bias=(kv_rows,),
        )
    if arch.family.query_key_norm:
        yield unit("whole", (attention + "q_layernorm.weight",), self_attn__q_norm__weight=(size,))
        yield unit("whole", (attention + "k_layernorm.weight",), self_attn__k_norm__weight=(size,))
    yield unit(
        "columns", (attention + "linear_proj.weight",), self_attn__o_proj__weight=(hidden, q_rows)
    )
    yield unit(
        "whole",
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        post_attention_layernorm__weight=(hidden,),
    )
    yield unit(
        "rows",
        ("mlp.linear_fc1.weight",),
        mlp__gate_proj__weight=(ffn, hidden),
        mlp__up_proj__weight=(ffn, hidden),
    )
    yield unit("columns", ("mlp.linear_fc2.weight",), mlp__down_proj__weight=(hidden, ffn))


def units(arch: Architecture) -> list[Unit]:
    """Every unit of the model, in export order; a tied head is not one of them."""
    table = (arch.vocab_size, arch.hidden_size)
    all_units = [Unit((EMBEDDING,), (table,), "vocab", ("embedding.word_embeddings.weight",))]
    for layer in range(arch.num_layers):
        all_units += _layer_units(arch, layer)
    all_units.append(
        Unit(
            ("model.norm.weight",),
            ((arch.hidden_size,),),
            "whole",
            ("decoder.final_layernorm.weight",),
        )
    )
    if not arch.tied_embeddings:
        all_units.append(Unit((HEAD,), (table,), "vocab", ("output_layer.weight",)))
    return all_units


def tied_head_unit(arch: Architecture) -> Unit:
    """With tied embeddings the last of several pipeline stages keeps a copy of the embedding."""
    table = (arch.vocab_size, arch.hidden_size)
    return Unit((EMBEDDING,), (table,), "vocab", ("output_layer.weight",))


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor, in export order."""
    return {
        name: shape
        for unit in units(arch)
        for name, shape in zip(unit.hf, unit.shapes, strict=True)
    }
