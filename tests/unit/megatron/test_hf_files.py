"""Model directories: slices are read, tensors written one by one, disagreements are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opd_megatron.errors import ConfigError
from opd_megatron.megatron.architecture import Architecture, architecture_of
from opd_megatron.megatron.hf import _check_tied_head
from opd_megatron.megatron.hf_names import EMBEDDING, HEAD, hf_shapes
from opd_megatron.megatron.safetensors_files import (
    INDEX_FILE,
    ModelWeights,
    check_tensors,
    write_model_files,
    write_safetensors,
)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "vocab_size": 10,
}


def _arch() -> Architecture:
    return architecture_of(CONFIG)


def _tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in hf_shapes(_arch()).items()}


def test_a_written_file_is_read_by_safetensors_exactly(tmp_path: Path) -> None:
    tensors = {n: t.bfloat16() for n, t in _tensors().items()}
    path = tmp_path / "model.safetensors"
    size = write_safetensors(
        path, hf_shapes(_arch()), torch.bfloat16, tensors.items(), {"format": "pt"}
    )
    assert path.stat().st_size == size
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)


def test_a_model_that_fits_is_one_file_and_a_larger_one_several_with_an_index(
    tmp_path: Path,
) -> None:
    tensors, shapes = _tensors(), hf_shapes(_arch())
    limit = 300  # bytes: the largest tensor has 384, the smallest 16
    for folder, largest in (("one", 10**9), ("many", limit)):
        (tmp_path / folder).mkdir()
        arrived = iter([(name, tensors[name]) for name in shapes])
        size = write_model_files(
            tmp_path / folder, shapes, torch.float32, arrived, {"weight_version": "7"}, largest
        )
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) == size
        read = ModelWeights(tmp_path / folder)
        check_tensors(read, _arch())
        for name, tensor in tensors.items():
            assert torch.equal(read.rows(name, 0, len(tensor)), tensor)
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    count = len(files)
    assert files[0].name == f"model-00001-of-{count:05d}.safetensors" and count > 3
    for file in files:
        with safe_open(file, framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= limit or len(sizes) == 1
            assert opened.metadata() == {"weight_version": "7"}
    index = json.loads((tmp_path / "many" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert list(index["weight_map"]) == list(shapes)


def test_slices_of_sharded_files(tmp_path: Path) -> None:
    tensors = _tensors()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({n: tensors[n] for n in members}, tmp_path / file)
    weight_map = {n: file for file, members in shards.items() for n in members}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    weights = ModelWeights(tmp_path)
    assert weights.names() == set(tensors)
    check_tensors(weights, _arch())
    table = tensors[EMBEDDING]
    assert torch.equal(weights.rows(EMBEDDING, 3, 7), table[3:7])
    assert torch.equal(weights.columns(EMBEDDING, 2, 6), table[:, 2:6])
    assert weights.rows(EMBEDDING, 10, 10).shape == (0, 8)  # a shard of padding only


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 2}, r"model\.layers\.1\..*the weights lack it"),
        ({"tie_word_embeddings": True, "vocab_size": 11}, r"shape \[10, 8\].*asks for \[11, 8\]"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            r"k_proj\.bias.*config.json has no place for it",
        ),
    ],
)
def test_config_and_weights_that_disagree_name_the_tensor(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=problem):
        check_tensors(ModelWeights(tmp_path), architecture_of(CONFIG | change))


@pytest.mark.parametrize("changed_row", [0, 4, 10])
def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_seen_by_the_rank_that_reads_it(
    tmp_path: Path, changed_row: int
) -> None:
    arch = architecture_of(CONFIG | {"tie_word_embeddings": True, "vocab_size": 11})
    tensors = {name: torch.randn(shape) for name, shape in hf_shapes(arch).items()}
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    for rank in range(2):
        _check_tied_head(ModelWeights(tmp_path), arch, 2, rank)
    tensors[HEAD][changed_row] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    seen = []
    for rank in range(2):
        try:
            _check_tied_head(ModelWeights(tmp_path), arch, 2, rank)
        except ConfigError as error:
            assert f"{HEAD}'" in str(error)
            seen.append(rank)
    assert seen == [changed_row * 2 // arch.padded_vocab_size]


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(ConfigError, match=f"{INDEX_FILE} can not be read"):
        ModelWeights(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.safetensors can not be read"):
        ModelWeights(tmp_path)
