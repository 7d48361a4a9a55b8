"""What the learner does on one GPU: Transformer Engine's layers against plain torch ones, FP8 recipes, a step's speed.

    python gpu_learner_worker.py OUT.json [cuda|cpu]

On `cpu` both kinds of layers are the plain ones and nothing is FP8: that only shows that this program runs.
OUT.json: errors of log-probs and gradients against plain layers in fp32, drift of each FP8 recipe from bf16, seconds,
tokens/s and peak memory of a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "real")]

import torch  # noqa: E402
from megatron_tiny import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    write_model,
    write_samples,
)

from opd_megatron.config.schema import (  # noqa: E402
    BatchConfig,
    CorrectionConfig,
    LearnerConfig,
    OptimizerConfig,
    Recipe,
    StudentConfig,
)
from opd_megatron.errors import ConfigError  # noqa: E402
from opd_megatron.exchange.batch_file import read_batch, read_index, read_whole  # noqa: E402
from opd_megatron.megatron import hf, model  # noqa: E402
from opd_megatron.megatron.learner import start_world  # noqa: E402
from opd_megatron.megatron.precision import FP8_RECIPES, check_gpu, current_gpu  # noqa: E402
from opd_megatron.megatron.state import LearnerState, build_state  # noqa: E402
from opd_megatron.megatron.step import StepResult, train  # noqa: E402

# Sizes that every FP8 recipe can cut into its blocks.
SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
}
# The shapes of Qwen3-0.6B.
QWEN3_0_6B: dict[str, Any] = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
LENGTHS = [(37, 90), (12, 200), (64, 64), (5, 251), (100, 140), (80, 33), (1, 99), (33, 180)]
TIMED_STEPS = 5


def recipe_for(
    path: Path, device: str, precision: str, fp8_recipe: str = "current", tokens: int = 1024
) -> Recipe:
    return Recipe(
        device=device,
        student=StudentConfig(path=str(path)),
        optimizer=OptimizerConfig(lr=1e-5, clip_grad=0.0),
        # A mask would turn a rounding into a whole token more or less.
        correction=CorrectionConfig(kind="none"),
        batch=BatchConfig(tokens_per_microbatch=tokens),
        learner=LearnerConfig(precision=precision, fp8_recipe=fp8_recipe),
    )


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Build what is built for a CPU, wherever it is put."""
    layer_spec, settings = model.layer_spec, model._device_settings
    model.layer_spec = lambda config, device, chunk=None: layer_spec(config, "cpu", chunk)
    model._device_settings = lambda device: settings("cpu")
    try:
        yield
    finally:
        model.layer_spec, model._device_settings = layer_spec, settings


def step_on(state: LearnerState, batch: Path) -> StepResult:
    return train(state, read_index(batch), lambda rows: read_batch(batch, rows), read_whole(batch))


@dataclasses.dataclass
class Seen:
    logprobs: torch.Tensor
    gradients: dict[str, torch.Tensor]


def look(path: Path, batch: Path, recipe: Recipe) -> Seen:
    """Log-probs and gradients of one step from the files' weights."""
    state = build_state(recipe)
    state.load_hf(path)
    result = step_on(state, batch)
    assert result.why_not_applied is None, result.why_not_applied
    gradients = {
        name: tensor.double().clone()
        for name, tensor in hf.stream(state.modules, state.arch, state.groups, "gradient")
    }
    return Seen(result.values["student_logprobs"].double(), gradients)


def differ(seen: Seen, reference: Seen) -> dict[str, float]:
    """Log-probs in nats; gradients as the norm of all differences over the norm of all."""
    nats = (seen.logprobs - reference.logprobs).abs()
    gradients = reference.gradients.items()
    squares = sum(float((seen.gradients[name] - g).square().sum()) for name, g in gradients)
    whole = sum(float(g.square().sum()) for _, g in gradients)
    return {
        "logprob_mean": float(nats.mean()),
        "logprob_max": float(nats.max()),
        "gradient": (squares / whole) ** 0.5,
    }


def supported_recipes(device: str) -> list[str]:
    if device == "cpu":
        return []
    names: list[str] = []
    for name in FP8_RECIPES:
        with contextlib.suppress(ConfigError):
            check_gpu(LearnerConfig(precision="fp8", fp8_recipe=name), current_gpu())
            names.append(name)
    return names


def layers_and_recipes(work: Path, device: str) -> dict[str, Any]:
    path = write_model(work / "small", "qwen3", **SMALL)
    batch = work / "batch.safetensors"
    write_samples(batch, LENGTHS, SMALL["vocab_size"], seed=1)
    with plain_layers():
        exact = look(path, batch, recipe_for(path, device, "fp32"))
        plain = look(path, batch, recipe_for(path, device, "bf16"))
    engine = look(path, batch, recipe_for(path, device, "bf16"))
    return {
        "plain_bf16_to_fp32": differ(plain, exact),
        "engine_bf16_to_fp32": differ(engine, exact),
        "fp8_to_bf16": {
            name: differ(look(path, batch, recipe_for(path, device, "fp8", name)), engine)
            for name in supported_recipes(device)
        },
    }


def speed(work: Path, device: str, precision: str, fp8_recipe: str) -> dict[str, Any]:
    """A step on 16 samples of 1024 tokens at Qwen3-0.6B's size; on a CPU, on the small one."""
    sizes, length = (QWEN3_0_6B, 1024) if device == "cuda" else (SMALL, 64)
    path, batch = work / "timed", work / "timed.safetensors"
    if not path.exists():
        write_model(path, "qwen3", tied=True, **sizes)
        write_samples(batch, [(length // 4, length * 3 // 4)] * 16, sizes["vocab_size"], seed=2)
    state = build_state(recipe_for(path, device, precision, fp8_recipe, tokens=4 * length))
    state.load_hf(path)
    step_on(state, batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    for _ in range(TIMED_STEPS):
        began = time.perf_counter()
        step_on(state, batch)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    middle = sorted(seconds)[TIMED_STEPS // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {"step_s": middle, "tokens_per_s": 16 * length / middle, "peak_gib": peak}


def main() -> None:
    out, device = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cuda"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.setdefault("MASTER_PORT", "29555")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        first = write_model(work / "first", "qwen3", **(SMALL | {"num_hidden_layers": 1}))
        start_world(recipe_for(first, device, "bf16"))
        results = layers_and_recipes(work, device)
        results["step"] = {"bf16": speed(work, device, "bf16", "current")}
        for name in supported_recipes(device):
            results["step"][name] = speed(work, device, "fp8", name)
    results["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results["torch"] = torch.__version__
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
