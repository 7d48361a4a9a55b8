"""Number formats of the learner, and what a GPU must be to run them. No torch: `opd validate` reads this.

`learner.precision`: fp32, bf16, or fp8, which computes the linear layers of transformer blocks in FP8 and everything
else (embedding, norms, attention, output head, weights kept by the optimizer) as bf16 does. `learner.fp8_recipe` is how
FP8 tensors are scaled, in Transformer Engine's words:

    delayed     one scale per tensor from earlier steps       current    one scale per tensor from this tensor
    blockwise   one scale per 128 or 128 x 128 values         mxfp8      one scale per 32 values, in hardware

Every GEMM needs its number of tokens to be a multiple of `alignment` on each rank, after context- and sequence-parallel
sharding. Formats and requirements are those that Transformer Engine 2.20.2 checks (pytorch/quantization.py,
`is_quantizable` of its tensors) and Megatron-Core's `get_fp8_align_size`. No recipe here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.errors import ConfigError

Version = tuple[int, int]


@dataclass(frozen=True)
class Fp8Recipe:
    """How Megatron-Core names a recipe and what it needs.

    `hybrid`: gradients in E5M2, which has the range that one scale per tensor needs; else all in E4M3.
    """

    megatron_name: str
    number_format: str
    alignment: int
    min_capability: Version
    max_capability: Version | None = None
    min_cuda: Version = (12, 1)
    bf16_layers: bool = True


_ADA, _HOPPER, _BLACKWELL, _BLACKWELL_DATACENTER_END = (8, 9), (9, 0), (10, 0), (11, 9)

FP8_RECIPES = {
    # Megatron-Core refuses bf16 layers with delayed scaling: it shares one amax reduction over all layers.
    "delayed": Fp8Recipe("delayed", "hybrid", 16, _ADA, bf16_layers=False),
    "current": Fp8Recipe("tensorwise", "hybrid", 16, _ADA),
    "blockwise": Fp8Recipe("blockwise", "e4m3", 128, _HOPPER, min_cuda=(12, 9)),
    "mxfp8": Fp8Recipe("mxfp8", "e4m3", 32, _BLACKWELL, _BLACKWELL_DATACENTER_END, (12, 8)),
}


@dataclass(frozen=True)
class Gpu:
    """The device a learner rank would run on."""

    name: str
    capability: Version
    cuda: Version | None  # that torch is built for; None where torch was not asked


def token_alignment(learner: LearnerConfig) -> int:
    """Tokens per rank must be a multiple of this."""
    return FP8_RECIPES[learner.fp8_recipe].alignment if learner.precision == "fp8" else 1


def fp8_settings(num_layers: int, learner: LearnerConfig) -> dict[str, Any]:
    """The recipe as settings of Megatron's TransformerConfig; nothing for other precisions.

    Raises:
        ConfigError: bf16 layers that leave no FP8 layer, or more than a pipeline stage has.
    """
    if learner.precision != "fp8":
        return {}
    recipe = FP8_RECIPES[learner.fp8_recipe]
    first, last = learner.fp8_bf16_first_layers, learner.fp8_bf16_last_layers
    if first + last >= num_layers:
        raise ConfigError.of(
            "learner.fp8_bf16_first_layers + learner.fp8_bf16_last_layers",
            first + last,
            f"leave no layer of {num_layers} in FP8",
            "lower them or set learner.precision=bf16",
        )
    per_stage = num_layers // learner.pipeline_parallel
    for key, count in (("fp8_bf16_first_layers", first), ("fp8_bf16_last_layers", last)):
        if count > per_stage:
            raise ConfigError.of(
                f"learner.{key}",
                count,
                f"Megatron-Core allows at most the {per_stage} layers of one pipeline stage",
                "lower it or learner.pipeline_parallel",
            )
    settings: dict[str, Any] = {"fp8": recipe.number_format, "fp8_recipe": recipe.megatron_name}
    if learner.fp8_recipe == "delayed":
        # Transformer Engine's own defaults; Megatron-Core's keep only the last step's maximum.
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if first or last:
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": first,
            "num_layers_at_end_in_bf16": last,
        }
    return settings


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def gpu_problems(learner: LearnerConfig, gpu: Gpu) -> Iterator[str]:
    """Why this GPU can not run the precision, one line each: key, value seen, rule, fix."""
    if learner.precision == "fp32":
        return
    if learner.precision == "bf16":
        if gpu.capability < (8, 0):
            yield (
                f"learner.precision='bf16': {gpu.name} has compute capability {_text(gpu.capability)}, bf16 needs "
                f"8.0 (Ampere); use a newer GPU"
            )
        return
    recipe = FP8_RECIPES[learner.fp8_recipe]
    key = f"learner.fp8_recipe={learner.fp8_recipe!r}"
    fits = [name for name, other in FP8_RECIPES.items() if _runs_on(other, gpu)]
    fix = f"use one of {', '.join(fits)}" if fits else "set learner.precision=bf16"
    if gpu.capability < recipe.min_capability:
        yield (
            f"{key}: {gpu.name} has compute capability {_text(gpu.capability)}, this recipe needs "
            f"{_text(recipe.min_capability)}; {fix}"
        )
    if recipe.max_capability and gpu.capability > recipe.max_capability:
        yield (
            f"{key}: Transformer Engine has no such kernels for compute capability {_text(gpu.capability)} "
            f"({gpu.name}); {fix}"
        )
    if gpu.cuda is not None and gpu.cuda < recipe.min_cuda:
        yield (
            f"{key}: torch is built for CUDA {_text(gpu.cuda)}, this recipe needs {_text(recipe.min_cuda)}; "
            f"install a newer build, or {fix}"
        )


def _runs_on(recipe: Fp8Recipe, gpu: Gpu) -> bool:
    in_range = recipe.min_capability <= gpu.capability <= (recipe.max_capability or gpu.capability)
    return in_range and (gpu.cuda is None or gpu.cuda >= recipe.min_cuda)


def check_gpu(learner: LearnerConfig, gpu: Gpu) -> None:
    """Refuse a precision that the GPU can not run.

    Raises:
        ConfigError: every reason.
    """
    problems = list(gpu_problems(learner, gpu))
    if problems:
        raise ConfigError("\n".join(problems))


def current_gpu() -> Gpu:
    """The device of this process. Imports torch.

    Raises:
        ConfigError: there is none.
    """
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        raise ConfigError.of(
            "device",
            "cuda",
            "torch sees no CUDA device in this process",
            "show it one (CUDA_VISIBLE_DEVICES, a CUDA build of torch), or set device=cpu",
        )
    major, minor = torch.version.cuda.split(".")[:2]
    return Gpu(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        (int(major), int(minor)),
    )
