"""What is about to be sent, checked against what the servers were started with.

SGLang takes a tensor whose name it does not know for a success, and one that is missing for nothing
at all. So names and shapes are compared, before the first byte travels, with the safetensors headers
of the model directory that every rollout server loaded at its start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from opd_megatron.errors import ContractError, did_you_mean
from opd_megatron.serving.weight_admin import Bucket

_DTYPES = ("float32", "bfloat16", "float16")
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Manifest:
    """Every tensor of an update, in the order of sending; one dtype."""

    dtype: str
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Manifest:
        """From the learner's answer to `offer`."""
        buckets = tuple(
            Bucket(tuple(bucket["names"]), tuple(tuple(shape) for shape in bucket["shapes"]))
            for bucket in answer["buckets"]
        )
        return cls(answer["dtype"], buckets)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: shape
            for bucket in self.buckets
            for name, shape in zip(bucket.names, bucket.shapes, strict=True)
        }


def model_shapes(model_path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Hugging Face directory, from the headers."""
    index = model_path / "model.safetensors.index.json"
    files: Sequence[str] = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        with safe_open(model_path / name, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118, not a mapping
                shapes[key] = tuple(opened.get_slice(key).get_shape())
    return shapes


def check_manifest(manifest: Manifest, model_path: Path) -> None:
    """Refuse an update that the servers could not load as a whole.

    Raises:
        ContractError: a tensor that the model does not have, lacks or has in another shape, or a
            dtype that is not one of weights; the tensor is named.
    """
    if manifest.dtype not in _DTYPES:
        raise ContractError(f"weights of dtype {manifest.dtype!r}: must be one of {_DTYPES}")
    sent, held = manifest.shapes(), model_shapes(model_path)
    for name, shape in sent.items():
        if name not in held:
            hint = did_you_mean(name, held)
            raise ContractError(f"tensor {name!r} is not in {model_path}{hint}; nothing was sent")
        if held[name] != shape:
            raise ContractError(
                f"tensor {name!r} has shape {list(shape)}, in {model_path} it has "
                f"{list(held[name])}; nothing was sent"
            )
    missing = {name for name in held if not name.endswith(_IGNORED_SUFFIX)} - set(sent)
    # A tied head may stand in the files beside the embedding that it is a copy of.
    for name in sorted(missing - {_TIED_HEAD}):
        raise ContractError(f"tensor {name!r} of {model_path} is not sent; nothing was")
    if _TIED_HEAD in missing and not _is_tied(model_path):
        raise ContractError(f"tensor {_TIED_HEAD!r} of {model_path} is not sent; nothing was")


def _is_tied(model_path: Path) -> bool:
    config = json.loads((model_path / "config.json").read_text())
    return config.get("tie_word_embeddings") is True
