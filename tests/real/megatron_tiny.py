"""Tiny students and step batches for the learner tests. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.megatron.architecture import architecture_of
from opd_megatron.megatron.hf_names import hf_shapes
from opd_megatron.types import Rollout, Sample, TeacherScores

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_parameters": _LLAMA3_ROPE,
    },
}
_BASE: dict[str, Any] = {
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 16384,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "vocab_size": 259,  # odd, so that padded columns and an uneven last shard exist
    "use_cache": True,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def model_config(family: str = "qwen3", tied: bool = False, **changes: Any) -> dict[str, Any]:
    """The config.json of a small model."""
    config = _BASE | _FAMILIES[family] | {"tie_word_embeddings": tied} | changes
    if family == "qwen2":
        config.pop("attention_bias")
    return config


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Everything but the weights."""
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text("{}")


def write_model(
    directory: Path, family: str = "qwen3", tied: bool = False, seed: int = 0, **changes: Any
) -> Path:
    """A Hugging Face directory with random weights that make every tensor matter."""
    config = model_config(family, tied, **changes)
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in hf_shapes(architecture_of(config)).items():
        values = generator.standard_normal(shape)
        if "norm" in name:
            values = 1 + 0.1 * values
        else:
            values *= 0.1 if name.endswith("bias") else 0.06
        tensors[name] = values.astype(np.float32)
    directory.mkdir(parents=True)
    write_config(directory, config)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _teacher(
    generator: np.random.Generator, response: np.ndarray, vocab_size: int, topk: int
) -> TeacherScores:
    """A random distribution per position: of the sampled tokens, and of the likeliest `topk`."""
    logits = generator.normal(0.0, 0.6, (len(response), vocab_size))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    sampled = logprobs[np.arange(len(response)), response].astype(np.float32)
    if not topk:
        return TeacherScores("main", sampled)
    ids = np.argsort(-logprobs, axis=1)[:, :topk]
    ordered = np.take_along_axis(logprobs, ids, axis=1)
    return TeacherScores("main", sampled, ids.astype(np.int32), ordered.astype(np.float32))


def make_samples(
    lengths: list[tuple[int, int]],
    vocab_size: int,
    seed: int,
    version: int = 0,
    topk: int = 0,
) -> list[Sample]:
    """Random samples of (prompt, response) lengths, with log-probs as of an untrained model.

    `topk`: so many of the teacher's likeliest tokens come along, at every position.
    """
    generator = np.random.default_rng(seed)
    samples = []
    for i, (prompt, response) in enumerate(lengths):
        ids = generator.integers(0, vocab_size, prompt + response)
        behavior = generator.normal(-np.log(vocab_size), 0.6, response)
        rollout = Rollout(
            sample_id=f"s{i}",
            prompt_id=f"p{i}",
            prompt_ids=tuple(ids[:prompt].tolist()),
            response_ids=tuple(ids[prompt:].tolist()),
            behavior_logprobs=np.minimum(behavior, -0.01).astype(np.float32),
            finish_reason="stop",
            version_first=version,
            version_last=version,
            server="rollout-0",
        )
        teacher = _teacher(generator, ids[prompt:], vocab_size, topk)
        samples.append(Sample(rollout, teacher))
    return samples


def write_samples(
    path: Path,
    lengths: list[tuple[int, int]],
    vocab_size: int,
    seed: int,
    version: int = 0,
    topk: int = 0,
) -> list[Sample]:
    """Write a step batch of `make_samples`."""
    samples = make_samples(lengths, vocab_size, seed, version, topk)
    write_batch(path, step=seed, weight_version=version, samples=samples)
    return samples
