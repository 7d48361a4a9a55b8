"""Rules between the keys of the learner: its layout, its precision, the schedule of its optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.schema import Recipe


def learner_problems(recipe: Recipe) -> Iterator[str]:
    """Every violated rule of these, as one line each."""
    yield from _layout(recipe)
    yield from _precision(recipe)
    yield from _schedule(recipe)


def _layout(recipe: Recipe) -> Iterator[str]:
    learner = recipe.learner
    if learner.sequence_parallel and learner.tensor_parallel == 1:
        yield (
            "learner.sequence_parallel=True: needs learner.tensor_parallel > 1; "
            "set learner.sequence_parallel=false"
        )
    if learner.virtual_pipeline > 1 and learner.pipeline_parallel == 1:
        yield (
            f"learner.virtual_pipeline={learner.virtual_pipeline}: needs learner.pipeline_parallel > 1; "
            f"set learner.virtual_pipeline=1"
        )
    if learner.overlap_param_gather and not learner.distributed_optimizer:
        yield (
            "learner.overlap_param_gather=True: without the distributed optimizer every rank updates all of its "
            "parameters; set learner.distributed_optimizer=true or learner.overlap_param_gather=false"
        )
    if recipe.batch.samples_per_step < learner.data_parallel:
        yield (
            f"learner.data_parallel={learner.data_parallel}: more ranks than the "
            f"{recipe.batch.samples_per_step} samples of a step; lower it or raise batch.prompts_per_step"
        )


def _precision(recipe: Recipe) -> Iterator[str]:
    learner = recipe.learner
    bf16_layers = {
        f"learner.{key}": getattr(learner, key)
        for key in ("fp8_bf16_first_layers", "fp8_bf16_last_layers")
    }
    if learner.precision != "fp8":
        for key, value in bf16_layers.items():
            if value:
                yield (
                    f"{key}={value}: learner.precision={learner.precision!r} has no FP8 layer; set it to 0 or "
                    f"learner.precision=fp8"
                )
        return
    if recipe.device == "cpu":
        yield (
            "learner.precision='fp8': device='cpu' has no FP8 kernels; set learner.precision=bf16 or device=cuda"
        )
    if learner.fp8_recipe == "delayed" and any(bf16_layers.values()):
        yield (
            "learner.fp8_recipe='delayed': Megatron-Core keeps no layer in bf16 with it; set "
            f"{' and '.join(bf16_layers)} to 0 or take another recipe"
        )


def _schedule(recipe: Recipe) -> Iterator[str]:
    config = recipe.optimizer
    if config.schedule == "constant":
        for key in ("decay_steps", "min_lr"):
            if value := getattr(config, key):
                yield (
                    f"optimizer.{key}={value!r}: a constant schedule does not use it; set optimizer.{key}=0 "
                    f"or optimizer.schedule to linear or cosine"
                )
        return
    end = config.decay_steps or recipe.steps
    if config.warmup_steps >= end:
        yield (
            f"optimizer.warmup_steps={config.warmup_steps}: the {config.schedule} decay ends at step {end} "
            f"(optimizer.decay_steps, or steps when that is 0); lower it or raise the end"
        )
    if config.min_lr > config.lr:
        yield (
            f"optimizer.min_lr={config.min_lr!r}: must be at most optimizer.lr={config.lr!r}; lower it"
        )
