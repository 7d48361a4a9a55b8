"""The estimate of a learner rank's memory: its counts against released models, its formulas against the papers'."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.launch.activation_memory import layer_bytes_per_token
from opd_megatron.launch.estimate_memory import (
    Batch,
    estimate_learner,
    estimate_stage,
    layers_in_flight,
    logits_bytes,
    stage_parameters,
)
from opd_megatron.megatron.architecture import FAMILIES, Architecture
from opd_megatron.megatron.hf_names import hf_shapes

QWEN3_4B = Architecture(
    family=FAMILIES["Qwen3ForCausalLM"],
    vocab_size=151936,
    hidden_size=2560,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    ffn_size=9728,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tied_embeddings=True,
)
QWEN3_06B = replace(
    QWEN3_4B, hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, ffn_size=3072
)
QWEN3_8B = replace(QWEN3_4B, hidden_size=4096, ffn_size=12288, tied_embeddings=False)
QWEN25_7B = replace(
    QWEN3_8B,
    family=FAMILIES["Qwen2ForCausalLM"],
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    ffn_size=18944,
)
LAYOUTS = [
    {"tensor_parallel": tp, "pipeline_parallel": pp} for tp, pp in product((1, 2, 4), (1, 2, 4))
]
TOKENS = Batch(tokens_per_microbatch=4096, num_microbatches=16)


def learner(**fields: Any) -> LearnerConfig:
    return LearnerConfig(**fields)


@pytest.mark.parametrize(
    ("arch", "count"),
    # As their model cards and configurations give them.
    [
        (QWEN3_06B, 596_049_920),
        (QWEN3_4B, 4_022_468_096),
        (QWEN3_8B, 8_190_735_360),
        (QWEN25_7B, 7_615_616_512),
    ],
)
def test_parameters_of_released_models_are_counted_exactly(arch: Architecture, count: int) -> None:
    assert stage_parameters(arch, learner(), 0) == count


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("arch", [QWEN3_4B, QWEN3_8B, QWEN25_7B], ids=("4B", "8B", "2.5-7B"))
def test_parameters_of_all_ranks_are_those_of_the_model_and_its_copies(
    arch: Architecture, layout: dict[str, int]
) -> None:
    tp, pp = layout["tensor_parallel"], layout["pipeline_parallel"]
    found = tp * sum(stage_parameters(arch, learner(**layout), stage) for stage in range(pp))
    shapes = hf_shapes(arch)
    size = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    # Norms lie on every tensor-parallel rank, tied embeddings on the first and on the last stage.
    copies = (tp - 1) * sum(n for name, n in size.items() if "norm" in name)
    table = arch.padded_vocab_size * arch.hidden_size
    copies += table if arch.tied_embeddings and pp > 1 else 0
    assert found == sum(size.values()) + copies


def test_states_are_what_mixed_precision_adam_keeps() -> None:
    """18 bytes a parameter with float32 gradients; the distributed optimizer divides 12 of them."""
    count = stage_parameters(QWEN3_4B, learner(), 0)

    def states(**fields: Any) -> int:
        stage = estimate_stage(QWEN3_4B, learner(**fields), TOKENS, "cuda", 0)
        return stage.weights + stage.gradients + stage.optimizer

    assert states() == 18 * count
    assert states(data_parallel=4) == 18 * count
    assert states(data_parallel=4, distributed_optimizer=True) == 9 * count
    assert states(data_parallel=2, context_parallel=2, distributed_optimizer=True) == 9 * count
    assert states(precision="fp32") == 16 * count


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_with_sequence_parallel_all_activations_are_divided(tp: int) -> None:
    """Korthikanti et al. 2022, equation 4; without it the norms' part is not (equation 2)."""
    whole = layer_bytes_per_token(QWEN3_4B, learner(), "cuda")
    split = learner(tensor_parallel=tp, sequence_parallel=True)
    assert layer_bytes_per_token(QWEN3_4B, split, "cuda") == pytest.approx(whole / tp)
    norms = 2 * 4 * QWEN3_4B.hidden_size
    plain = learner(tensor_parallel=tp)
    wanted = norms + (whole - norms) / tp
    assert layer_bytes_per_token(QWEN3_4B, plain, "cuda") == pytest.approx(wanted)


def test_full_recomputation_keeps_two_bytes_of_hidden_states_a_layer() -> None:
    """Korthikanti et al. 2022, section 5: 2 s b h L."""
    kept = estimate_stage(QWEN3_4B, learner(recompute=True), TOKENS, "cuda", 0)
    without = estimate_stage(QWEN3_4B, learner(), TOKENS, "cuda", 0)
    final_norm = 2 * 2 * 4096 * QWEN3_4B.hidden_size
    assert kept.peak == without.peak == "loss"
    assert kept.activations - final_norm == 2 * 4096 * QWEN3_4B.hidden_size * QWEN3_4B.num_layers
    assert without.activations > 8 * kept.activations


@pytest.mark.parametrize("pp", [2, 4, 6])
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_the_first_stage_holds_what_the_papers_say(pp: int, vpp: int) -> None:
    """1F1B: all L layers' worth; interleaved: L (1 + (p - 1) / (p v)) (Korthikanti et al. 2022, section 4.2.3)."""
    layout, arch = (
        learner(pipeline_parallel=pp, virtual_pipeline=vpp),
        replace(QWEN3_4B, num_layers=72),
    )
    wanted = arch.num_layers * (1 if vpp == 1 else 1 + (pp - 1) / (pp * vpp))
    assert layers_in_flight(arch, layout, 0, 64) == pytest.approx(wanted)
    # Never more than there are micro-batches.
    assert layers_in_flight(arch, layout, 0, 1) == arch.num_layers // pp


def test_the_mode_of_the_loss_decides_how_often_the_logits_are_there() -> None:
    logits = 2 * 4096 * 151936
    assert logits_bytes(QWEN3_4B, learner(), 4096, "cuda") == logits
    assert logits_bytes(QWEN3_4B, learner(loss_mode="stored"), 4096, "cuda") == 2 * logits
    chunk = 256 << 20
    hidden = 2 * 4096 * QWEN3_4B.hidden_size
    for mode in ("chunked", "recompute"):
        assert logits_bytes(QWEN3_4B, learner(loss_mode=mode), 4096, "cuda") == chunk + hidden
    halved = learner(tensor_parallel=2)
    assert logits_bytes(QWEN3_4B, halved, 4096, "cuda") == logits // 2


def test_terms_add_up_and_more_of_anything_never_needs_less() -> None:
    base = estimate_learner(QWEN3_4B, learner(), TOKENS, "cuda")[0]
    assert sum(base.terms.values()) == base.total
    for more in (
        estimate_learner(QWEN3_4B, learner(), replace(TOKENS, tokens_per_microbatch=8192), "cuda"),
        estimate_learner(replace(QWEN3_4B, num_layers=40), learner(), TOKENS, "cuda"),
        estimate_learner(QWEN3_4B, learner(precision="fp32"), TOKENS, "cuda"),
        estimate_learner(QWEN3_4B, learner(loss_mode="stored"), TOKENS, "cuda"),
    ):
        assert more[0].total > base.total
    for less in (
        learner(tensor_parallel=2),
        learner(tensor_parallel=2, sequence_parallel=True),
        learner(pipeline_parallel=2),
        learner(context_parallel=2),
        learner(recompute=True),
        learner(data_parallel=2, distributed_optimizer=True),
    ):
        stages = estimate_learner(QWEN3_4B, less, TOKENS, "cuda")
        assert len(stages) == less.pipeline_parallel
        assert max(stage.total for stage in stages) < base.total
