"""Sizes of published models, for what is planned or checked where their files are not.

From the config.json, the generation_config.json and the parameter count on each model's Hugging Face page
(https://huggingface.co/Qwen, https://huggingface.co/meta-llama, https://huggingface.co/open-thoughts). A tied output
head is counted once. Only what the architecture needs is kept of each config. The files of a model, where they are,
always win over this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd_megatron.errors import ConfigError, did_you_mean
from opd_megatron.megatron.architecture import Architecture, architecture_of

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
}
_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(
    hidden: int, ffn: int, layers: int, heads: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        **more,
    }


# Name -> (config.json, parameters).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-0.6B": (_QWEN3 | _sizes(1024, 3072, 28, 16, True), 596_049_920),
    "Qwen3-1.7B": (_QWEN3 | _sizes(2048, 6144, 28, 16, True), 1_720_574_976),
    "Qwen3-4B": (_QWEN3 | _sizes(2560, 9728, 36, 32, True), 4_022_468_096),
    "Qwen3-8B": (_QWEN3 | _sizes(4096, 12288, 36, 32, False), 8_190_735_360),
    "Qwen3-14B": (_QWEN3 | _sizes(5120, 17408, 40, 40, False), 14_768_307_200),
    "Qwen3-32B": (_QWEN3 | _sizes(5120, 25600, 64, 64, False), 32_762_123_264),
    "Qwen2.5-0.5B": (
        _QWEN2 | _sizes(896, 4864, 24, 14, True, num_key_value_heads=2, vocab_size=151936),
        494_032_768,
    ),
    "Qwen2.5-1.5B": (
        _QWEN2 | _sizes(1536, 8960, 28, 12, True, num_key_value_heads=2, vocab_size=151936),
        1_543_714_304,
    ),
    "Qwen2.5-7B": (
        _QWEN2 | _sizes(3584, 18944, 28, 28, False, num_key_value_heads=4),
        7_615_616_512,
    ),
    "Qwen2.5-14B": (
        _QWEN2 | _sizes(5120, 13824, 48, 40, False, num_key_value_heads=8),
        14_770_033_664,
    ),
    "Qwen2.5-32B": (
        _QWEN2 | _sizes(5120, 27648, 64, 40, False, num_key_value_heads=8),
        32_763_876_352,
    ),
    "Llama-3-8B": (_LLAMA3 | _sizes(4096, 14336, 32, 32, False), 8_030_261_248),
    "Llama-3.1-8B": (
        _LLAMA3 | _sizes(4096, 14336, 32, 32, False, rope_scaling=_ROPE | {"factor": 8.0}),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        _LLAMA3
        | _sizes(2048, 8192, 16, 32, True, head_dim=64, rope_scaling=_ROPE | {"factor": 32.0}),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        _LLAMA3
        | _sizes(3072, 8192, 28, 24, True, head_dim=128, rope_scaling=_ROPE | {"factor": 32.0}),
        3_212_749_824,
    ),
}

_BASE, _CHAT = ("<|endoftext|>",), ("<|endoftext|>", "<|im_end|>")


@dataclass(frozen=True)
class KnownModel:
    """A released model. `end_tokens`: what ends its responses; empty where that was not looked up."""

    architecture: str
    context: int
    end_tokens: tuple[str, ...] = ()


def _qwen3() -> dict[str, KnownModel]:
    found: dict[str, KnownModel] = {}
    for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B"):
        found[f"Qwen/Qwen3-{size}"] = KnownModel(f"Qwen3-{size}", 40960, _CHAT)
        if size != "32B":  # released without a base model
            found[f"Qwen/Qwen3-{size}-Base"] = KnownModel(f"Qwen3-{size}", 32768, _BASE)
    return found


# Hugging Face id -> what it is.
KNOWN_MODELS: dict[str, KnownModel] = {
    **_qwen3(),
    "Qwen/Qwen2.5-7B-Instruct": KnownModel("Qwen2.5-7B", 32768, _CHAT),
    "open-thoughts/OpenThinker3-7B": KnownModel("Qwen2.5-7B", 32768),
    # A Qwen3-4B-Base after GRPO, teacher of "Rethinking On-Policy Distillation" (arXiv 2604.13016).
    "lllyx/Qwen3-4B-Base-GRPO": KnownModel("Qwen3-4B", 32768),
    # What recipes/qwen3_8b_base_sft_... exports; not published by this project.
    "Qwen3-8B-Base-SFT": KnownModel("Qwen3-8B", 32768, _BASE),
}


def known_model(name: str, key: str) -> KnownModel:
    """
    Raises:
        ConfigError: not in the table; suggests the closest name.
    """
    if name not in KNOWN_MODELS:
        raise ConfigError.of(
            key,
            name,
            f"not on this machine, and not in the table of published models"
            f"{did_you_mean(name, KNOWN_MODELS)}",
            "give the directory of the model",
        )
    return KNOWN_MODELS[name]


def known_architecture(name: str, key: str) -> Architecture:
    """
    Raises:
        ConfigError: as `known_model`.
    """
    model = known_model(name, key)
    return architecture_of(PUBLISHED[model.architecture][0], name)
