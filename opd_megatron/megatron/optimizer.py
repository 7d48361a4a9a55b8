"""Megatron's AdamW, and a step that is applied on all ranks or on none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer

from opd_megatron.config.schema import LearnerConfig, OptimizerConfig
from opd_megatron.megatron import adamw_state
from opd_megatron.megatron.model import DTYPES
from opd_megatron.megatron.schedule import LearningRateSchedule, curve_of


def build_optimizer(
    models: Sequence[DistributedDataParallel], config: OptimizerConfig, learner: LearnerConfig
) -> ChainedOptimizer:
    """A fresh optimizer over the model's current weights (they must be loaded already)."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.lr,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
            bf16=DTYPES[learner.precision] is torch.bfloat16,
            params_dtype=DTYPES[learner.precision],
            use_distributed_optimizer=learner.distributed_optimizer,
            overlap_param_gather=learner.overlap_param_gather,
        ),
        list(models),
    )
    assert isinstance(optimizer, ChainedOptimizer)
    adamw_state.prime(optimizer)
    return optimizer


def build_scheduler(
    optimizer: ChainedOptimizer, config: OptimizerConfig, steps: int
) -> LearningRateSchedule:
    """The learning rate of every step of a run of `steps`, from its beginning."""
    return LearningRateSchedule(optimizer, curve_of(config, steps), config.weight_decay)


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Global L2 norm of the reduced gradients, equal on all ranks; NaN or inf if any entry is."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_gradients(optimizer: ChainedOptimizer, norm: float) -> None:
    """Clip by the global norm and step. Call `gradient_norm` first; the norm must be finite."""
    assert math.isfinite(norm)
    for part in optimizer.chained_optimizers:
        parameters: list[torch.Tensor] = list(part.get_parameters())
        if part.config.clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    optimizer.step_with_ready_grads()
