"""Builds students with Transformer Engine's layers on a CPU, without its binaries, and moves weights through them.

    python megatron_te_worker.py WORK TRANSFORMER_ENGINE_SITE

The site holds the Python part of the package alone. What is faked is what only a GPU could run: the compiled
extension (every function of it raises) and its Triton kernels. So modules can be built and hold weights; nothing can be
computed.
WORK/te.json: per model and recipe what the builder made, and whether Hugging Face weights went in and out unchanged.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from megatron_cases import VOCAB
from megatron_tiny import write_model


class _Members(type):
    """A class that is also an enum of whatever members it is asked for, numbered as they come."""

    __members__: dict[str, int]

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls.__members__.setdefault(name, len(cls.__members__))


def _needs_gpu(name: str) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name} of Transformer Engine needs a GPU")

    return function


class _Extension(types.ModuleType):
    """`transformer_engine_torch`: names exist, nothing runs."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Members(name, (), {"__members__": {}}) if name[0].isupper() else _needs_gpu(name)
        setattr(self, name, made)
        return made


def fake_binaries(site: str) -> None:
    """Before Megatron is imported."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # then transformer_engine.common loads no library
    sys.path.append(site)
    extension = _Extension("transformer_engine_torch")
    extension.get_cudnn_version = lambda: 91900  # type: ignore[attr-defined]
    sys.modules["transformer_engine_torch"] = extension
    for package in ("transformer_engine.pytorch.triton", "transformer_engine.common.triton"):
        kernels = ("pad", "permutation", "cross_entropy", "mhc", "grouped_dbias_dscales")
        for name in (package, *(f"{package}.{kernel}" for kernel in kernels)):
            module = MagicMock(name=name)
            module.__path__, module.__spec__ = [], None
            sys.modules[name] = module
    import transformer_engine.common as common  # pyright: ignore[reportMissingImports]

    common.load_framework_extension = lambda framework: None


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """While modules are built: Transformer Engine asks whether there is a GPU and which."""
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *_: (9, 0),
    }
    stock = {name: getattr(torch.cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(torch.cuda, name, function)


def build(path: Path, **learner: Any) -> dict[str, Any]:
    """Build a student as for CUDA, load its files, stream them out again."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from safetensors.torch import load_file

    from opd_megatron.config.schema import LearnerConfig
    from opd_megatron.megatron import hf
    from opd_megatron.megatron.architecture import architecture_of, read_config
    from opd_megatron.megatron.model import build_stage, transformer_config
    from opd_megatron.megatron.parallel import current_groups

    arch, config = architecture_of(read_config(path)), LearnerConfig(**learner)
    transformer = transformer_config(arch, config, "cuda")
    transformer.use_cpu_initialization = True
    with pretended_gpu():
        modules = build_stage(arch, transformer, config, "cuda")
    groups = current_groups()
    hf.mark_sharded(modules, arch)
    hf.load(modules, arch, path, groups.tp)
    files = {
        name: t.to(torch.bfloat16) for name, t in load_file(path / "model.safetensors").items()
    }
    streamed = {name: t.clone() for name, t in hf.stream(modules, arch, groups)}
    recipe = get_fp8_recipe(transformer) if transformer.fp8 else None
    names = dict(modules[0].named_parameters())
    return {
        "differ": [n for n in files if not torch.equal(files[n], streamed.pop(n, torch.empty(0)))],
        "left_over": sorted(streamed),
        "layers": sorted({type(m).__name__ for m in modules[0].modules()}),
        "fused_norms": sum(name.endswith(".layer_norm_weight") for name in names),
        "recipe": type(recipe).__name__,
        "format": None if recipe is None else recipe.fp8_format.name,
        "sharded": len(modules[0].sharded_state_dict()) >= len(names),
    }


def shards_of_two_ranks(path: Path) -> dict[str, list[str]]:
    """The second of two tensor-parallel ranks, in a world that is played: parameters that are not as large as what is
    read for them, and units that it lacks. The process group of before must have ended.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from opd_megatron.config.schema import LearnerConfig
    from opd_megatron.megatron import hf
    from opd_megatron.megatron.architecture import architecture_of, read_config
    from opd_megatron.megatron.hf_names import units
    from opd_megatron.megatron.model import build_stage, transformer_config
    from opd_megatron.megatron.parallel import current_groups
    from opd_megatron.megatron.safetensors_files import ModelWeights

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    arch = architecture_of(read_config(path))
    learner = LearnerConfig(precision="bf16", tensor_parallel=2, sequence_parallel=True)
    transformer = transformer_config(arch, learner, "cuda")
    transformer.use_cpu_initialization = True
    with pretended_gpu():
        modules = build_stage(arch, transformer, learner, "cuda")
    weights, tp = ModelWeights(path), current_groups().tp
    held = hf.local_parameters(modules, arch)
    shards = [hf.read_shard(weights, unit, arch, tp.size(), tp.rank()) for unit, _ in held]
    differ = [
        f"{unit.hf}: {list(shard.shape)} into {list(parameter.shape)}"
        for (unit, parameter), shard in zip(held, shards, strict=True)
        if shard.shape != parameter.shape
    ]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    names = {unit.hf for unit, _ in held}
    return {"differ": differ, "missing": [str(u.hf) for u in units(arch) if u.hf not in names]}


def devices_differ_in(path: Path) -> list[str]:
    """Settings of Megatron's configuration that depend on the device."""
    from opd_megatron.config.schema import LearnerConfig
    from opd_megatron.megatron.architecture import architecture_of, read_config
    from opd_megatron.megatron.model import transformer_config

    arch, learner = architecture_of(read_config(path)), LearnerConfig()
    cpu, cuda = (vars(transformer_config(arch, learner, device)) for device in ("cpu", "cuda"))
    # Initialisers are new functions in every configuration; nothing is initialised with them.
    return sorted(k for k in cpu if cpu[k] != cuda[k] and not k.endswith("init_method"))


def main() -> None:
    work, site = Path(sys.argv[1]), sys.argv[2]
    fake_binaries(site)
    from opd_megatron.megatron import cpu_shim, parallel

    cpu_shim.install()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, 1, is_master=True
    )
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    from megatron.core import parallel_state

    # Not parallel.start_model_parallel: a CPU generator among the CUDA ones stops Transformer Engine.
    parallel_state.initialize_model_parallel()
    assert parallel.current_groups().tp.size() == 1
    families = {
        "qwen3": ("qwen3", False),
        "qwen3_tied": ("qwen3", True),
        "qwen2_tied": ("qwen2", True),
        "llama": ("llama", False),
    }
    results: dict[str, Any] = {}
    for name, (family, tied) in families.items():
        path = write_model(work / name, family, tied, vocab_size=VOCAB)
        results[f"{name}-bf16"] = build(path, precision="bf16")
        for recipe in ("delayed", "current", "blockwise", "mxfp8"):
            results[f"{name}-{recipe}"] = build(path, precision="fp8", fp8_recipe=recipe)
    adam = getattr(importlib.import_module("megatron.core.optimizer"), "Adam")  # noqa: B009
    results["optimizer"] = {"class": f"{adam.__module__}.{adam.__qualname__}"}
    results["devices"] = {"differ": devices_differ_in(work / "llama")}
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    for name in families:
        results[f"{name}-two-ranks"] = shards_of_two_ranks(work / name)
    (work / "te.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
