"""Sections of the learner: optimizer, batch, Megatron world."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.schema.fields import choice, number


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. The learning rate's formula is in megatron/schedule.py; `decay_steps` 0 means the run's `steps`."""

    lr: float = number(1e-6, 0.0, 1.0)
    beta1: float = number(0.9, 0.0, 1.0)
    beta2: float = number(0.95, 0.0, 1.0)
    eps: float = number(1e-8, 0.0)
    weight_decay: float = number(0.0, 0.0)
    clip_grad: float = number(1.0, 0.0)
    schedule: str = choice("constant", "constant", "linear", "cosine")
    warmup_steps: int = number(0, 0)
    decay_steps: int = number(0, 0)
    min_lr: float = number(0.0, 0.0, 1.0)
    max_bad_steps: int = number(3, 1)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Three words for batch size; the rest is derived."""

    prompts_per_step: int = number(32, 1)
    rollouts_per_prompt: int = number(4, 1)
    tokens_per_microbatch: int = number(4096, 8)
    # Every sample fills a row as long as the longest of the step, instead of samples that lie end to end: for attention
    # kernels that take no packed sequences.
    padded: bool = False
    # Optimizer updates on every step batch, each on the whole of it.
    updates_per_step: int = number(1, 1, 64)

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The Megatron-Core world."""

    tensor_parallel: int = number(1, 1)
    pipeline_parallel: int = number(1, 1)
    # Model chunks per pipeline stage; above 1 the schedule is interleaved 1F1B.
    virtual_pipeline: int = number(1, 1)
    context_parallel: int = number(1, 1)
    data_parallel: int = number(1, 1)
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    # Gather updated parameters while the next forward pass runs, reduce gradients while the backward pass does.
    overlap_param_gather: bool = False
    recompute: bool = False
    # How the loss meets the vocabulary (megatron/output_head.py), and what computes its rows.
    loss_mode: str = choice("in_place", "stored", "in_place", "chunked", "recompute")
    loss_backend: str = choice("auto", "auto", "torch", "compiled", "triton")
    # fp8: the linear layers of transformer blocks, through Transformer Engine; the head stays in bf16.
    precision: str = choice("bf16", "fp32", "bf16", "fp8")
    fp8_recipe: str = choice("current", "delayed", "current", "blockwise", "mxfp8")
    fp8_bf16_first_layers: int = number(0, 0)
    fp8_bf16_last_layers: int = number(0, 0)
    # Ranks up; one command answered; no rank moving: from one micro-batch to the next, or a checkpoint read or written.
    start_timeout_s: float = number(300.0, 1)
    step_timeout_s: float = number(1800.0, 1)
    hang_timeout_s: float = number(600.0, 1)

    @property
    def world_size(self) -> int:
        return (
            self.tensor_parallel
            * self.pipeline_parallel
            * self.context_parallel
            * self.data_parallel
        )
