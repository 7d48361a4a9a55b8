"""The name table on the real sizes of 0.6B-32B students: parameter counts, layouts that fit, layouts that do not."""

from __future__ import annotations

import math

import pytest

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.errors import ConfigError
from opd_megatron.megatron.architecture import architecture_of, check_layout
from opd_megatron.megatron.hf_names import hf_shapes, units
from opd_megatron.megatron.known_models import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_name_table_counts_the_published_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    shapes = hf_shapes(architecture_of(config, name))
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_unit_cuts_evenly_at_each_tensor_parallel_size_that_the_layout_check_lets_through(
    name: str,
) -> None:
    arch = architecture_of(PUBLISHED[name][0], name)
    fits: list[int] = []
    for tp in (1, 2, 4, 8):
        try:
            check_layout(arch, LearnerConfig(tensor_parallel=tp))
        except ConfigError:
            continue
        fits.append(tp)
        for unit in units(arch):
            if unit.kind in ("rows", "heads"):
                assert all(shape[0] % tp == 0 for shape in unit.shapes), (tp, unit)
            if unit.kind == "columns":
                assert unit.shapes[0][1] % tp == 0, (tp, unit)
        assert arch.padded_vocab_size % tp == 0 and arch.padded_vocab_size >= arch.vocab_size
    assert fits == [
        tp for tp in (1, 2, 4, 8) if tp <= arch.num_kv_heads and arch.num_heads % tp == 0
    ]


@pytest.mark.parametrize(
    ("name", "learner", "complaint"),
    [
        ("Qwen2.5-7B", LearnerConfig(tensor_parallel=8), "num_attention_heads = 28"),
        ("Qwen2.5-1.5B", LearnerConfig(tensor_parallel=4), "num_key_value_heads = 2"),
        ("Qwen3-4B", LearnerConfig(pipeline_parallel=8), "num_hidden_layers = 36"),
        (
            "Qwen3-32B",
            LearnerConfig(pipeline_parallel=4, virtual_pipeline=3),
            "layers of a pipeline stage = 16",
        ),
    ],
)
def test_a_layout_that_does_not_fit_names_what_does_not_divide(
    name: str, learner: LearnerConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_layout(architecture_of(PUBLISHED[name][0], name), learner)
