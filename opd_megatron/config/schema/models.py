"""Sections of the models: student, teachers, and the servers that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_megatron.config.schema.fields import choice, number


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the SGLang servers of one role are launched."""

    num_servers: int = number(1, 1)
    tensor_parallel: int = number(1, 1)
    context_length: int = number(4096, 8)
    # Tokens in the KV cache. 0: the server takes what mem_fraction_static leaves, which is for GPUs.
    max_total_tokens: int = number(0, 0)
    dtype: str = choice("bfloat16", "float32", "bfloat16", "float16")
    mem_fraction_static: float = number(0.8, 0.01, 0.98)
    start_timeout_s: float = number(300.0, 1)
    request_timeout_s: float = number(600.0, 1)
    max_retries: int = number(3, 0, 20)
    # How often a server that died is started again within one attempt; the one after that ends the attempt.
    max_restarts: int = number(3, 0, 100)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns: a Hugging Face directory (config, safetensors, tokenizer, chat template)."""

    path: str = ""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A frozen model that scores what the student wrote.

    `engine`: `sglang` servers send log-probs of the sampled tokens and of its top-K; `in_process` is a second Megatron
    model inside the learner, on the learner's layout, whose whole vocabulary the loss may use. `offload` (in_process)
    moves its weights to host memory while it does not score. `temperature`: the student learns its distribution at
    this temperature, as a rule that of the rollout.
    """

    path: str = ""
    engine: str = choice("sglang", "sglang", "in_process")
    offload: bool = False
    temperature: float = number(1.0, 0.01, 10.0)
    # Student token -> teacher token that mean the same, by their text; in the teacher's scores the two swap places.
    # For a Base student under an Instruct teacher: {"<|endoftext|>": "<|im_end|>"}.
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    # Differences from the student's tokenizer that are known: special_tokens, segmentation, chat_template.
    accept: list[str] = field(default_factory=list[str])
    # A teacher with the student's own weights has nothing to teach, unless it is asked in another way.
    may_equal_student: bool = False
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student generates. Log-probs in the loss are at this temperature.

    top_p, top_k and min_p truncate: only some tokens can be sampled at a position. The loss knows how much
    probability they held (losses/truncation.py).
    """

    temperature: float = number(1.0, 0.01, 10.0)
    top_p: float = number(1.0, 0.01, 1.0)
    top_k: int = number(-1, -1)
    min_p: float = number(0.0, 0.0, 1.0)
    # Of one turn.
    max_new_tokens: int = number(1024, 1)
    server: ServerConfig = field(default_factory=ServerConfig)

    @property
    def truncates(self) -> bool:
        """Some tokens can not be sampled."""
        return self.top_p < 1.0 or self.top_k != -1 or self.min_p > 0.0
