"""What benchmarks/step.py measures: shapes of students, layouts, batches. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from opd_megatron.config.schema import BatchConfig, LearnerConfig, Recipe, StudentConfig
from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.megatron.architecture import architecture_of
from opd_megatron.megatron.hf_names import hf_shapes
from opd_megatron.types import Rollout, Sample, TeacherScores


@dataclass(frozen=True)
class Shape:
    """A Qwen3 student; heads are 64 wide, except where it copies a released model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head: int = 64
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "eos_token_id": 1,
        }


SHAPES = {
    "tiny": Shape(hidden=256, layers=4, heads=4, kv_heads=2, ffn=768, vocab=4096),
    "small": Shape(hidden=384, layers=6, heads=6, kv_heads=2, ffn=1152, vocab=16384),
    "wide": Shape(hidden=256, layers=4, heads=4, kv_heads=2, ffn=768, vocab=65536, tied=True),
    "0.6B": Shape(
        hidden=1024, layers=28, heads=16, kv_heads=8, ffn=3072, vocab=151936, head=128, tied=True
    ),
    "4B": Shape(
        hidden=2560, layers=36, heads=32, kv_heads=8, ffn=9728, vocab=151936, head=128, tied=True
    ),
}


@dataclass(frozen=True)
class StepCase:
    """One row of the tables; travels to the ranks as JSON.

    `samples` responses of `prompt` + `response` tokens each are one step batch.
    """

    name: str
    device: str
    shape: str
    learner: dict[str, Any] = field(default_factory=dict[str, Any])
    tokens_per_microbatch: int = 512
    samples: int = 8
    prompt: int = 32
    response: int = 96
    repeats: int = 16
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return self.samples * (self.prompt + self.response)

    @property
    def precision(self) -> str:
        return "fp32" if self.device == "cpu" else "bf16"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> StepCase:
        return StepCase(**json.loads(text))

    def recipe(self, student: Path) -> Recipe:
        """The default objective: sampled-token reverse KL with masked importance weights."""
        return Recipe(
            name="benchmark",
            device=self.device,
            student=StudentConfig(path=str(student)),
            batch=BatchConfig(tokens_per_microbatch=self.tokens_per_microbatch),
            learner=LearnerConfig(**{"precision": self.precision, **self.learner}),
        )


_LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("1 rank", {}),
    ("recompute", {"recompute": True}),
    ("TP 2", {"tensor_parallel": 2}),
    ("TP 2, SP", {"tensor_parallel": 2, "sequence_parallel": True}),
    ("PP 2", {"pipeline_parallel": 2}),
    ("CP 2", {"context_parallel": 2}),
    ("DP 2", {"data_parallel": 2}),
    ("DP 2, distributed optimizer", {"data_parallel": 2, "distributed_optimizer": True}),
)
_CUDA: dict[str, Any] = {
    "tokens_per_microbatch": 8192,
    "samples": 32,
    "prompt": 256,
    "response": 1792,
    "repeats": 7,
}


def cases(device: str, *, quick: bool = False) -> Iterator[StepCase]:
    """Every case of a device: layouts on one shape, then shapes and modes of the loss on one rank."""
    if device == "cuda":
        yield StepCase("0.6B", device, "0.6B", **_CUDA)
        yield StepCase("0.6B, recompute", device, "0.6B", {"recompute": True}, **_CUDA)
        yield StepCase("0.6B, chunked", device, "0.6B", {"loss_mode": "chunked"}, **_CUDA)
        yield StepCase("4B, recompute", device, "4B", {"recompute": True}, **_CUDA)
        return
    effort: dict[str, Any] = {"repeats": 1, "samples": 4} if quick else {}
    for name, learner in _LAYOUTS:
        yield StepCase(f"small, {name}", device, "tiny" if quick else "small", learner, **effort)
    yield StepCase("tiny, 1 rank", device, "tiny", **effort)
    for mode in ("in_place", "stored", "chunked"):
        yield StepCase(
            f"wide, {mode}", device, "tiny" if quick else "wide", {"loss_mode": mode}, **effort
        )


def write_student(directory: Path, shape: Shape, seed: int) -> Path:
    """A Hugging Face directory with seeded random weights in float32."""
    config = shape.config()
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, size in hf_shapes(architecture_of(config)).items():
        if "norm" in name:
            tensors[name] = np.ones(size, np.float32)
        else:
            tensors[name] = generator.standard_normal(size, np.float32) * np.float32(0.02)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_step_batch(path: Path, case: StepCase) -> None:
    """Random tokens; log-probs such that no token leaves the bounds of its weight by more than chance."""
    vocab = SHAPES[case.shape].vocab
    generator = np.random.default_rng(case.seed)
    samples: list[Sample] = []
    for number in range(case.samples):
        ids = generator.integers(0, vocab, case.prompt + case.response)
        behavior = generator.normal(-np.log(vocab), 0.2, case.response).astype(np.float32)
        teacher = generator.normal(-np.log(vocab), 0.5, case.response).astype(np.float32)
        rollout = Rollout(
            sample_id=f"p{number}#0",
            prompt_id=f"p{number}",
            prompt_ids=tuple(ids[: case.prompt].tolist()),
            response_ids=tuple(ids[case.prompt :].tolist()),
            behavior_logprobs=behavior,
            finish_reason="stop",
            version_first=0,
            version_last=0,
            server="none",
        )
        samples.append(Sample(rollout, TeacherScores("main", teacher)))
    write_batch(path, step=1, weight_version=0, samples=samples)
