"""An update that a server could not load as a whole is refused before anything is sent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from opd_megatron.errors import ContractError
from opd_megatron.megatron.buckets import filled_buckets, plan_buckets
from opd_megatron.serving.weight_admin import Bucket
from opd_megatron.weight_sync.manifest import Manifest, check_manifest

SHAPES = {"model.norm.weight": (4,), "model.a.weight": (3, 4), "lm_head.weight": (5, 4)}


def model(folder: Path, tied: bool = False, sharded: bool = False) -> Path:
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return folder
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"part{number}.safetensors")
    weight_map = {name: f"part{number}.safetensors" for number, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def manifest(**changes: tuple[int, ...] | None) -> Manifest:
    shapes = {**SHAPES, **{k.replace("__", "."): v for k, v in changes.items()}}
    kept = {name: shape for name, shape in shapes.items() if shape is not None}
    return Manifest("float32", (Bucket(tuple(kept), tuple(kept.values())),))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_model_itself_passes(tmp_path: Path, sharded: bool) -> None:
    check_manifest(manifest(), model(tmp_path, sharded=sharded))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__nrm__weight": (4,)},
            r"'model.nrm.weight' is not in .*did you mean 'model.norm.weight'",
        ),
        ({"model__a__weight": (4, 3)}, r"'model.a.weight' has shape \[4, 3\], .* it has \[3, 4\]"),
        ({"model__a__weight": None}, r"'model.a.weight' of .* is not sent"),
        ({"lm_head__weight": None}, r"'lm_head.weight' of .* is not sent"),
    ],
)
def test_an_unknown_a_misshapen_and_a_missing_tensor_are_named(
    tmp_path: Path, changes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        check_manifest(manifest(**changes), model(tmp_path))


def test_a_tied_head_need_not_be_sent(tmp_path: Path) -> None:
    check_manifest(manifest(lm_head__weight=None), model(tmp_path, tied=True))


def test_a_dtype_that_is_not_one_of_weights_is_refused(tmp_path: Path) -> None:
    wrong = dataclasses.replace(manifest(), dtype="int32")
    with pytest.raises(ContractError, match="dtype 'int32'"):
        check_manifest(wrong, model(tmp_path))


def test_buckets_keep_the_order_and_the_limit_and_a_large_tensor_travels_alone() -> None:
    shapes = {"a": (4,), "b": (2, 3), "c": (100,), "d": (1,), "e": (9,)}
    buckets = plan_buckets(shapes, torch.float32, 40)
    assert [[name for name, _ in b.tensors] for b in buckets] == [["a", "b"], ["c"], ["d", "e"]]
    assert [b.num_bytes for b in buckets] == [40, 400, 40]
    assert [pair for b in buckets for pair in b.tensors] == list(shapes.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_carries_the_bytes_of_every_tensor(dtype: torch.dtype) -> None:
    shapes = {"a": (4,), "b": (2, 3), "c": (100,), "d": (1,)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    buckets = plan_buckets(shapes, dtype, 40)
    filled = filled_buckets(buckets, iter(tensors.items()), dtype, torch.device("cpu"))
    seen, storages = [], set()
    for bucket, flat in zip(buckets, filled, strict=True):
        seen.append(flat.clone())
        storages.add(flat.untyped_storage().data_ptr())
        assert flat.untyped_storage().nbytes() == max(b.num_bytes for b in buckets)
        assert flat.numel() == bucket.num_bytes
    assert len(storages) == 1
    wanted = torch.cat([tensor.flatten() for tensor in tensors.values()])
    assert torch.equal(torch.cat(seen).view(dtype), wanted)


def test_a_tensor_other_than_the_announced_one_is_never_sent() -> None:
    buckets = plan_buckets({"a": (4,), "b": (4,)}, torch.float32, 64)
    stream = iter([("a", torch.zeros(4)), ("c", torch.zeros(4))])
    with pytest.raises(AssertionError):
        list(filled_buckets(buckets, stream, torch.float32, torch.device("cpu")))
