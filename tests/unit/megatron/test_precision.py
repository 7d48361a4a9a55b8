"""Precision: what it means to Megatron's configuration, which GPU may run it, and how batches are aligned for it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.rules import problems
from opd_megatron.config.schema import (
    BatchConfig,
    DataConfig,
    LearnerConfig,
    Recipe,
    RolloutConfig,
)
from opd_megatron.errors import ConfigError
from opd_megatron.launch.gpus import check_named_hardware, check_precision, parse_cuda, parse_gpus
from opd_megatron.megatron.architecture import Architecture, architecture_of
from opd_megatron.megatron.layout import check_micro_batch, layout_of
from opd_megatron.megatron.model import transformer_config
from opd_megatron.megatron.precision import FP8_RECIPES, Gpu, check_gpu, fp8_settings
from opd_megatron.megatron.version import TESTED_VERSIONS, check_version

A100 = Gpu("A100", (8, 0), (13, 0))
L40 = Gpu("L40", (8, 9), (13, 0))
H100 = Gpu("H100", (9, 0), (13, 0))
GB200 = Gpu("GB200", (10, 0), (13, 0))
RTX5090 = Gpu("RTX 5090", (12, 0), (13, 0))
V100 = Gpu("V100", (7, 0), (12, 0))


def fp8(recipe: str, **keys: Any) -> LearnerConfig:
    return LearnerConfig(precision="fp8", fp8_recipe=recipe, **keys)


@pytest.fixture
def arch() -> Architecture:
    return architecture_of(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_hidden_layers": 8,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "vocab_size": 259,
        }
    )


@pytest.mark.parametrize(
    ("recipe", "name", "number_format"),
    [
        ("delayed", "delayed", "hybrid"),
        ("current", "tensorwise", "hybrid"),
        ("blockwise", "blockwise", "e4m3"),
        ("mxfp8", "mxfp8", "e4m3"),
    ],
)
def test_each_recipe_reaches_megatrons_configuration(
    arch: Architecture, recipe: str, name: str, number_format: str
) -> None:
    config = transformer_config(arch, fp8(recipe), "cpu")
    assert (config.fp8, config.fp8_recipe) == (number_format, name)
    assert config.bf16 and not config.first_last_layers_bf16
    assert (config.fp8_amax_history_len == 1024) == (recipe == "delayed")


def test_bf16_layers_at_both_ends_reach_megatrons_configuration(arch: Architecture) -> None:
    learner = fp8("current", fp8_bf16_first_layers=2, fp8_bf16_last_layers=1)
    config = transformer_config(arch, learner, "cpu")
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_precisions_have_no_fp8(arch: Architecture, precision: str) -> None:
    assert not transformer_config(arch, LearnerConfig(precision=precision), "cpu").fp8
    assert fp8_settings(8, LearnerConfig(precision=precision)) == {}


def test_cuda_without_transformer_engine_is_refused_with_what_to_install(
    arch: Architecture,
) -> None:
    if importlib.util.find_spec("transformer_engine") is not None:
        assert transformer_config(arch, LearnerConfig(), "cuda").apply_rope_fusion
        return
    with pytest.raises(ConfigError, match="needs Transformer Engine; install"):
        transformer_config(arch, LearnerConfig(), "cuda")


@pytest.mark.parametrize(
    ("keys", "pipeline", "complaint"),
    [
        ({"fp8_bf16_first_layers": 5, "fp8_bf16_last_layers": 3}, 1, "leave no layer of 8 in FP8"),
        ({"fp8_bf16_first_layers": 3}, 4, "at most the 2 layers of one pipeline stage"),
    ],
)
def test_bf16_layers_that_do_not_fit_are_refused(
    keys: dict[str, int], pipeline: int, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        fp8_settings(8, fp8("current", pipeline_parallel=pipeline, **keys))


@pytest.mark.parametrize(
    ("gpu", "runs"),
    [
        (V100, set()),
        (A100, set()),
        (L40, {"delayed", "current"}),
        (H100, {"delayed", "current", "blockwise"}),
        (GB200, {"delayed", "current", "blockwise", "mxfp8"}),
        (RTX5090, {"delayed", "current", "blockwise"}),
        (Gpu("H100", (9, 0), (12, 8)), {"delayed", "current"}),
    ],
)
def test_each_gpu_runs_the_recipes_it_has_kernels_for_and_the_others_name_the_reason(
    gpu: Gpu, runs: set[str]
) -> None:
    for recipe in FP8_RECIPES:
        if recipe in runs:
            check_gpu(fp8(recipe), gpu)
            continue
        with pytest.raises(ConfigError) as raised:
            check_gpu(fp8(recipe), gpu)
        text = str(raised.value)
        assert text.startswith(f"learner.fp8_recipe={recipe!r}: ")
        assert all(other in text for other in runs) if runs else "learner.precision=bf16" in text


def test_bf16_needs_ampere_and_fp32_nothing() -> None:
    check_gpu(LearnerConfig(precision="fp32"), V100)
    check_gpu(LearnerConfig(precision="bf16"), A100)
    with pytest.raises(ConfigError, match=r"bf16 needs 8\.0"):
        check_gpu(LearnerConfig(precision="bf16"), V100)


def test_validate_reads_the_gpus_of_this_machine_and_names_the_one_that_can_not() -> None:
    gpus = parse_gpus("NVIDIA GB200, 10.0\nNVIDIA H100 80GB HBM3, 9.0\n\n[N/A], [N/A]\n")
    assert [(g.name, g.capability) for g in gpus] == [
        ("NVIDIA GB200", (10, 0)),
        ("NVIDIA H100 80GB HBM3", (9, 0)),
    ]
    recipe = Recipe(device="cuda", learner=fp8("mxfp8"))
    check_precision(recipe, gpus[:1])
    check_precision(recipe, [])
    with pytest.raises(ConfigError, match=r"this recipe needs 10\.0.*\(GPU 1 of this machine\)"):
        check_precision(recipe, gpus)


def test_a_recipe_named_after_a_gpu_takes_no_precision_that_it_lacks() -> None:
    """Where no GPU is, as on a login node."""
    name = "qwen3_4b_base_from_qwen3_32b_32gpu_{}_mxfp8"
    recipe = Recipe(device="cuda", name=name.format("gb200"), learner=fp8("mxfp8"))
    check_named_hardware(recipe)
    check_named_hardware(dataclasses.replace(recipe, name="my_recipe"))
    with pytest.raises(ConfigError, match=r"H100 has compute capability 9\.0.* use one of .*h100"):
        check_named_hardware(dataclasses.replace(recipe, name=name.format("h100")))


@pytest.mark.parametrize(
    ("text", "cuda"), [("12.8", (12, 8)), ("13.0", (13, 0)), (None, None), ("", None)]
)
def test_validate_compares_the_cuda_that_torch_is_built_for(
    text: str | None, cuda: tuple[int, int] | None
) -> None:
    assert parse_cuda(text) == cuda
    gpus = parse_gpus("NVIDIA H100 80GB HBM3, 9.0\n", cuda)
    recipe = Recipe(device="cuda", learner=fp8("blockwise"))
    if cuda != (12, 8):
        check_precision(recipe, gpus)
        return
    with pytest.raises(
        ConfigError, match=r"torch is built for CUDA 12\.8, this recipe needs 12\.9"
    ):
        check_precision(recipe, gpus)


@pytest.mark.parametrize("recipe", sorted(FP8_RECIPES))
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_every_ranks_shard_of_a_micro_batch_is_aligned(recipe: str, tp: int, cp: int) -> None:
    learner = fp8(recipe, tensor_parallel=tp, context_parallel=cp, sequence_parallel=tp > 1)
    layout = layout_of(learner)
    shard, rest = divmod(layout.token_multiple, tp * cp)
    assert rest == 0
    assert shard % FP8_RECIPES[recipe].alignment == 0
    assert layout.token_multiple % layout.document_multiple == 0


@pytest.mark.parametrize(
    ("learner", "needed"),
    [
        (LearnerConfig(), 899),
        (LearnerConfig(tensor_parallel=4, context_parallel=2), 904),
        (fp8("mxfp8", tensor_parallel=4, context_parallel=2), 1024),
    ],
)
def test_a_micro_batch_that_the_longest_sample_overflows_once_it_is_aligned_is_refused_at_once(
    learner: LearnerConfig, needed: int
) -> None:
    recipe = Recipe(
        learner=learner,
        data=DataConfig(max_prompt_tokens=400),
        rollout=RolloutConfig(max_new_tokens=500),
        batch=BatchConfig(tokens_per_microbatch=needed),
    )
    check_micro_batch(recipe)
    smaller = dataclasses.replace(recipe, batch=BatchConfig(tokens_per_microbatch=needed - 1))
    with pytest.raises(ConfigError, match=rf"raise it to at least {needed}$"):
        check_micro_batch(smaller)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"precision": "fp8"}, "device='cpu' has no FP8 kernels"),
        ({"precision": "bf16", "fp8_bf16_last_layers": 1}, "has no FP8 layer"),
        (
            {"precision": "fp8", "fp8_recipe": "delayed", "fp8_bf16_first_layers": 1},
            "keeps no layer in bf16",
        ),
        ({"virtual_pipeline": 2}, "needs learner.pipeline_parallel > 1"),
        ({"fp8_recipe": "mxfp"}, "did you mean 'mxfp8'?"),
    ],
)
def test_settings_that_can_not_run_are_refused_before_anything_starts(
    keys: dict[str, Any], complaint: str
) -> None:
    recipe = Recipe(device="cpu", learner=LearnerConfig(**keys))
    assert any(complaint in line for line in problems(recipe))


def test_this_megatron_is_a_tested_one() -> None:
    assert check_version() in TESTED_VERSIONS


def test_an_untested_megatron_is_refused_with_what_to_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = tmp_path / "megatron_core-0.99.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.99.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as raised:
        check_version()
    text = str(raised.value)
    assert "megatron-core='0.99.0'" in text and "tests/real/test_megatron_*.py" in text
