"""What a Hugging Face config.json says about a dense decoder: Qwen3, Qwen2.5, Llama 3.

Families differ in three switches (query/key norm, bias on q/k/v, rope scaling). A config that asks
for something these models do not have here (sliding window, other activations, other rope types) is
refused rather than ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.errors import ConfigError

# Vocabulary rows are padded to a multiple that does not depend on the tensor-parallel size, so that
# neither the loss nor a checkpoint does. 128: a shard at TP 8 is still a multiple of 16, which FP8
# kernels need. Very small vocabularies (tests, the demo) would be mostly padding with it.
_VOCABULARY_MULTIPLE = 128
_SMALL_VOCABULARY = 4096
_SMALL_VOCABULARY_MULTIPLE = 16

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Family:
    """Switches of a model family, by Hugging Face class name."""

    query_key_norm: bool
    qkv_bias: bool


FAMILIES = {
    "Qwen3ForCausalLM": Family(query_key_norm=True, qkv_bias=False),
    "Qwen2ForCausalLM": Family(query_key_norm=False, qkv_bias=True),
    "LlamaForCausalLM": Family(query_key_norm=False, qkv_bias=False),
}


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling; only its factor is free in Megatron-Core."""

    factor: float


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only transformer."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tied_embeddings: bool

    @property
    def padded_vocab_size(self) -> int:
        is_small = self.vocab_size < _SMALL_VOCABULARY
        multiple = _SMALL_VOCABULARY_MULTIPLE if is_small else _VOCABULARY_MULTIPLE
        return -(-self.vocab_size // multiple) * multiple


def read_config(model_path: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        ConfigError: no such file.
    """
    path = model_path / CONFIG_FILE
    if not path.is_file():
        raise ConfigError.of(
            "model path", str(model_path), f"has no {CONFIG_FILE}", "use a Hugging Face directory"
        )
    return json.loads(path.read_text())


def _rope(config: dict[str, Any], where: str) -> tuple[float, Llama3RopeScaling | None]:
    """Theta and scaling; newer files hold both in `rope_parameters`, older in two keys."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    fixed = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if kind != "llama3" or any(parameters.get(k) != v for k, v in fixed.items()):
        raise ConfigError.of(
            f"{where}: rope", parameters, f"supported: default, or llama3 with {fixed}", "use such"
        )
    return theta, Llama3RopeScaling(factor=float(parameters["factor"]))


def architecture_of(config: dict[str, Any], where: str = CONFIG_FILE) -> Architecture:
    """Check a config.json and read what the model needs.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        ConfigError: another family, or a setting that is not built here.
    """
    names = config.get("architectures") or []
    if len(names) != 1 or names[0] not in FAMILIES:
        raise ConfigError.of(
            f"{where}: architectures", names, "not supported", f"use one of {sorted(FAMILIES)}"
        )
    family = FAMILIES[names[0]]
    forbidden = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(config.get("use_sliding_window", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "attention_bias": bool(config.get("attention_bias", False)) and not family.qkv_bias,
    }
    for key, is_bad in forbidden.items():
        if is_bad:
            raise ConfigError.of(
                f"{where}: {key}", config[key], "not supported by the learner", "use another model"
            )
    theta, scaling = _rope(config, where)
    heads = config["num_attention_heads"]
    return Architecture(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_size=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def check_teacher(
    name: str, arch: Architecture, student: Architecture, learner: LearnerConfig
) -> None:
    """Refuse a teacher that can not stand beside the student on the learner's ranks.

    Raises:
        ConfigError: another vocabulary than the student's, or as `check_layout`.
    """
    if arch.vocab_size != student.vocab_size:
        raise ConfigError.of(
            f"teachers.{name}.engine",
            "in_process",
            f"its vocabulary of {arch.vocab_size} rows is not the student's of {student.vocab_size}",
            "use models whose embeddings have the same number of rows",
        )
    check_layout(arch, learner, f"teachers.{name}'s ")


def check_layout(arch: Architecture, learner: LearnerConfig, whose: str = "") -> None:
    """Refuse sizes that do not divide.

    Args:
        whose: in front of the size's name in the message.

    Raises:
        ConfigError: heads, groups, ffn or layers do not fit the layout.
    """
    tp, pp = learner.tensor_parallel, learner.pipeline_parallel
    vpp = learner.virtual_pipeline
    for what, size, key, parts in (
        ("num_attention_heads", arch.num_heads, "learner.tensor_parallel", tp),
        ("num_key_value_heads", arch.num_kv_heads, "learner.tensor_parallel", tp),
        ("intermediate_size", arch.ffn_size, "learner.tensor_parallel", tp),
        ("padded vocabulary", arch.padded_vocab_size, "learner.tensor_parallel", tp),
        ("num_hidden_layers", arch.num_layers, "learner.pipeline_parallel", pp),
        ("layers of a pipeline stage", arch.num_layers // pp, "learner.virtual_pipeline", vpp),
    ):
        if size % parts:
            raise ConfigError.of(
                key, parts, f"must divide {whose}{what} = {size}", "choose a divisor"
            )
