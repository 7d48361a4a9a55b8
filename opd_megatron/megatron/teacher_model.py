"""A frozen teacher inside the learner: its own weights and size, on the student's process groups.

It is built like the student (same layout, chunks of a virtual pipeline included), without gradient
buffers, optimizer or recomputation, in `learner.precision` (bf16 where that is fp8: its scores
should be the model's, not a quantisation's). Its output layer hands the hidden states through, so
its logits exist only where and when they are asked for, a few rows at a time (`TeacherHead`).

With `offload` the weights live in host memory, pinned on CUDA, and are on the device from
`on_device` to its end: teachers that take turns need the room of one. Frozen weights never change,
so the host copy is made once and leaving costs nothing but the free. The output weight is the
exception: a `TeacherHead` that is still held keeps that one tensor on the device.

Shape suffixes: T tokens of this rank's micro-batch, B rows and S tokens of what the model returns
(output_head.py), C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from opd_megatron.config.schema import Recipe
from opd_megatron.losses.fused.head import chunk_rows
from opd_megatron.losses.fused.rows import Backend
from opd_megatron.losses.teacher_logits import LocalLogits, swap_columns
from opd_megatron.megatron import hf
from opd_megatron.megatron.architecture import (
    Architecture,
    architecture_of,
    check_teacher,
    read_config,
)
from opd_megatron.megatron.model import build_stage, transformer_config
from opd_megatron.megatron.output_head import hidden_rows
from opd_megatron.megatron.parallel import Groups
from opd_megatron.teacher.aliases import aliases_of


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's output layer; on the last pipeline stage only.

    weight_VH: [V / tp, H]. swaps: aliases; logits come out in the student's ids. temperature: of what its
    statistics say; the logits are as they are.
    """

    weight_VH: torch.Tensor
    swaps: Mapping[int, int]
    vocab_size: int
    groups: Groups
    sequence_parallel: bool
    backend: Backend
    temperature: float = 1.0

    @property
    def chunk_rows(self) -> int:
        """Rows of which logits are made at once."""
        return chunk_rows(self.weight_VH, None)

    def gathered(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """[T, H] of all sequence-parallel ranks."""
        return hidden_rows(hidden_BSH, self.groups.tp if self.sequence_parallel else None)

    @torch.no_grad()
    def logits(self, hidden_TH: torch.Tensor) -> LocalLogits:
        """This rank's shard of the logits of some rows."""
        logits_TV = hidden_TH @ self.weight_VH.T
        group = self.groups.tp_or_none
        swap_columns(logits_TV, self.swaps, vocab_size=self.vocab_size, group=group)
        return LocalLogits(logits_TV, self.vocab_size, group, self.backend, self.temperature)

    def chunks(self, hidden_TH: torch.Tensor) -> Iterator[tuple[slice, LocalLogits]]:
        """(rows, their logits), a bounded number of rows at a time, the same on every rank."""
        step = self.chunk_rows
        for start in range(0, len(hidden_TH), step):
            rows = slice(start, min(start + step, len(hidden_TH)))
            yield rows, self.logits(hidden_TH[rows])


class InProcessTeacher:
    """Built on every rank by `build_teacher`."""

    def __init__(
        self,
        name: str,
        arch: Architecture,
        modules: Sequence[GPTModel],
        groups: Groups,
        swaps: Mapping[int, int],
        recipe: Recipe,
    ) -> None:
        self.name = name
        self.arch = arch
        self.modules = list(modules)
        self._groups = groups
        self._swaps = swaps
        self._learner = recipe.learner
        self._device = torch.device(recipe.device)
        self._head_weight: torch.Tensor | None = None
        self._hosted: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        last = self.modules[-1]
        if last.post_process:
            self._hand_through(last)

    def _hand_through(self, module: GPTModel) -> None:
        layer: Any = module.output_layer

        def forward(
            hidden: torch.Tensor, weight: torch.Tensor | None = None, **_: Any
        ) -> tuple[torch.Tensor, None]:
            # Tied embeddings come as an argument, an output weight of its own lies in the layer.
            self._head_weight = (layer.weight if weight is None else weight).detach()
            return hidden, None

        layer.forward = forward

    @property
    def head(self) -> TeacherHead:
        """After a forward pass, on the last pipeline stage."""
        assert self._head_weight is not None, "the output layer ran before"
        return TeacherHead(
            weight_VH=self._head_weight,
            swaps=self._swaps,
            vocab_size=self.arch.vocab_size,
            groups=self._groups,
            sequence_parallel=self._learner.sequence_parallel,
            backend=self._learner.loss_backend,  # type: ignore[arg-type]
        )

    def offload(self) -> None:
        """Keep the weights in host memory from now on, except within `on_device`."""
        for module in self.modules:
            for parameter in module.parameters():
                host = parameter.detach().cpu()
                if parameter.is_cuda:
                    host = host.pin_memory()
                self._hosted.append((parameter, host))
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights on the device; nothing to do for a teacher that is not offloaded."""
        for parameter, host in self._hosted:
            # A copy also on the CPU, so that a wrong host copy can not go unnoticed there.
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self._head_weight = None
        for parameter, host in self._hosted:
            parameter.data = host


def build_teacher(
    recipe: Recipe, name: str, student: Architecture, groups: Groups
) -> InProcessTeacher:
    """Build a teacher and load its weights; process groups must exist. Collective.

    Raises:
        ConfigError: its config.json is not supported, its vocabulary is not the student's, the
            layout does not divide it, or its files and config.json disagree.
    """
    config = recipe.teachers[name]
    arch = architecture_of(read_config(Path(config.path)), config.path)
    check_teacher(name, arch, student, recipe.learner)
    learner = dataclasses.replace(recipe.learner, recompute=False)
    if learner.precision == "fp8":
        learner = dataclasses.replace(
            learner, precision="bf16", fp8_bf16_first_layers=0, fp8_bf16_last_layers=0
        )
    modules = build_stage(
        arch, transformer_config(arch, learner, recipe.device), learner, recipe.device
    )
    for module in modules:
        module.requires_grad_(False)
    hf.load(modules, arch, Path(config.path), groups.tp)
    teacher = InProcessTeacher(name, arch, modules, groups, aliases_of(recipe)[name].swaps, recipe)
    if config.offload:
        teacher.offload()
    return teacher
