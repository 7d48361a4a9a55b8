"""Everything a learner rank holds: recipe, groups, model, optimizer, schedule, step counter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, ContractError
from opd_megatron.exchange.beats import Mark, unwatched
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import TokenLoss, make_token_loss
from opd_megatron.megatron import hf
from opd_megatron.megatron.architecture import Architecture, architecture_of, read_config
from opd_megatron.megatron.checkpoint_writer import PlannedSave
from opd_megatron.megatron.hf_names import hf_shapes
from opd_megatron.megatron.layout import Layout, layout_of
from opd_megatron.megatron.model import build_stage, transformer_config, wrap_data_parallel
from opd_megatron.megatron.optimizer import build_optimizer, build_scheduler
from opd_megatron.megatron.output_head import OutputHead, make_output_head
from opd_megatron.megatron.parallel import Groups, current_groups
from opd_megatron.megatron.schedule import LearningRateSchedule
from opd_megatron.megatron.server_group import ServerGroup
from opd_megatron.megatron.teacher_model import InProcessTeacher, build_teacher


@dataclass
class LearnerState:
    """Built by `build_state` with unusable weights; `load_hf` or a checkpoint makes them usable."""

    recipe: Recipe
    arch: Architecture
    config: TransformerConfig
    layout: Layout
    groups: Groups
    models: list[
        DistributedDataParallel
    ]  # chunks of this stage: one, or those of a virtual pipeline
    head: OutputHead
    token_loss: TokenLoss
    teachers: dict[str, InProcessTeacher]  # those inside the learner
    has_weights: bool = False
    optimizer: ChainedOptimizer | None = None
    scheduler: LearningRateSchedule | None = None
    optimizer_step: int = 0
    saving: PlannedSave | None = None  # begun in the background and not finished
    server_group: ServerGroup | None = None  # on rank 0, while weights are broadcast
    mark: Mark = unwatched  # told what begins, for whoever watches this rank

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    @property
    def modules(self) -> list[GPTModel]:
        """The chunks without the gradient buffers around them."""
        return [model.module for model in self.models if isinstance(model.module, GPTModel)]

    @property
    def num_parameters(self) -> int:
        """Of the whole model, without vocabulary padding."""
        return sum(int(torch.Size(shape).numel()) for shape in hf_shapes(self.arch).values())

    def require_weights(self) -> None:
        """
        Raises:
            ContractError: nothing was loaded yet.
        """
        if not self.has_weights:
            raise ContractError("the learner has no weights yet; send `load` first")

    def require_loaded(self) -> ChainedOptimizer:
        """The optimizer of loaded weights.

        Raises:
            ContractError: nothing was loaded yet, or weights alone.
        """
        self.require_weights()
        if self.optimizer is None:
            raise ContractError("the learner has weights alone; send `load` with an optimizer")
        return self.optimizer

    def fresh_optimizer(self) -> None:
        """A new optimizer and schedule over the present weights."""
        config = self.recipe.optimizer
        self.optimizer = build_optimizer(self.models, config, self.recipe.learner)
        self.scheduler = build_scheduler(self.optimizer, config, self.recipe.steps)
        self.optimizer_step = 0

    def load_hf(self, model_path: Path) -> None:
        """Weights of a Hugging Face directory and a fresh optimizer.

        Raises:
            ConfigError: another architecture than the recipe's student, or damaged files.
        """
        arch = architecture_of(read_config(model_path), str(model_path))
        if arch != self.arch:
            raise ConfigError.of(
                "load path",
                str(model_path),
                f"its architecture {arch} is not the student's {self.arch}",
                "load a model of the student's architecture",
            )
        hf.load(self.modules, arch, model_path, self.groups.tp)
        self.has_weights = True
        self.fresh_optimizer()


def build_state(recipe: Recipe) -> LearnerState:
    """Model and gradient buffers of this rank for a recipe, and its teachers. Process groups must exist.

    Raises:
        ConfigError: a config.json or the layout is not supported, or as `build_teacher`.
    """
    student = Path(recipe.student.path)
    arch = architecture_of(read_config(student), str(student))
    config = transformer_config(arch, recipe.learner, recipe.device)
    modules = build_stage(arch, config, recipe.learner, recipe.device)
    hf.mark_sharded(modules, arch)
    groups = current_groups()
    return LearnerState(
        recipe=recipe,
        arch=arch,
        config=config,
        layout=layout_of(recipe.learner),
        groups=groups,
        head=make_output_head(recipe.learner, arch.vocab_size, groups, modules),
        models=wrap_data_parallel(modules, config, recipe.learner),
        token_loss=make_token_loss(LossSettings.of(recipe), allow_nan=True),
        teachers={
            name: build_teacher(recipe, name, arch, groups) for name in recipe.in_process_teachers
        },
    )
