"""config.json to Architecture: what is read, and what is refused with the key named."""

from __future__ import annotations

from typing import Any

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.megatron import version
from opd_megatron.megatron.architecture import Llama3RopeScaling, architecture_of
from opd_megatron.megatron.hf_names import EMBEDDING, HEAD, hf_shapes

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "vocab_size": 259,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_old_and_new_rope_keys_mean_the_same() -> None:
    old = {k: v for k, v in QWEN3.items() if k != "rope_parameters"} | {"rope_theta": 1e6}
    assert architecture_of(QWEN3) == architecture_of(old)
    assert architecture_of(QWEN3).rope_theta == 1e6


def test_llama3_rope_keeps_its_factor() -> None:
    config = QWEN3 | {"architectures": ["LlamaForCausalLM"], "rope_theta": 5e5}
    arch = architecture_of(config | {"rope_parameters": None, "rope_scaling": LLAMA3_ROPE})
    assert (arch.rope_theta, arch.rope_scaling) == (5e5, Llama3RopeScaling(32.0))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2.0}}, "rope"),
    ],
)
def test_what_is_not_built_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {key}"):
        architecture_of(QWEN3 | change)


@pytest.mark.parametrize(("size", "padded"), [(32, 32), (259, 272), (4097, 4224), (151936, 151936)])
def test_vocabulary_padding_does_not_depend_on_the_layout(size: int, padded: int) -> None:
    assert architecture_of(QWEN3 | {"vocab_size": size}).padded_vocab_size == padded


def test_a_tied_head_is_written_once() -> None:
    tied = hf_shapes(architecture_of(QWEN3 | {"tie_word_embeddings": True}))
    untied = hf_shapes(architecture_of(QWEN3))
    assert EMBEDDING in tied and HEAD not in tied
    assert set(untied) - set(tied) == {HEAD}


def test_an_untested_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = version.check_version()
    monkeypatch.setattr(version, "TESTED_VERSIONS", ("9.9.9",))
    with pytest.raises(ConfigError, match=rf"megatron-core='{installed}'.*9\.9\.9.*test_megatron"):
        version.check_version()
