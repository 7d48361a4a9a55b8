"""A step batch on disk: flat arrays in one safetensors file, so that a rank can map just its own samples.

    sample_offsets  [N + 1] int64     tokens of sample i are tokens[sample_offsets[i]:sample_offsets[i + 1]]
    prompt_lengths  [N]     int32     of these, the first prompt_lengths[i] are the prompt
    tokens          [sum(P + L)] int32
    response_offsets [N + 1] int64    the per-response-token arrays below are cut with these
    behavior_logprobs, teacher_logprobs  [sum L] float32
    kept_logmass [sum L] float32      only when rollouts are truncated: log of the mass that truncation kept
    trainable [sum L] uint8           0 for tokens masked for what they are
    groups   [N] int32                samples of one prompt share a number
    rewards  [N] float32              only with a task term
    topk_ids [sum L, K] int32, topk_logprobs [sum L, K] float32    only when the objective needs a support
    token_versions [sum L] int32      weight version that wrote each response token, -1 where no weights did

Scores of a teacher inside the learner are not there yet: NaN, and id -1 in a top-K (`teacher/in_process.py`).
Metadata: `step`, `weight_version`, `sample_ids` (JSON), `teachers` (JSON), `format`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from opd_megatron.errors import ContractError
from opd_megatron.exchange.array_file import write_arrays
from opd_megatron.types import Sample

FORMAT = "opd-step-batch-3"
EntropyOf = Callable[[NDArray[np.float32]], NDArray[np.float32]]

# Of a top-K, read at a time: 16 MiB for K = 64.
_ROWS_AT_ONCE = 1 << 16

_SLICED_DTYPES: dict[str, type] = {
    "tokens": np.int32,
    "behavior_logprobs": np.float32,
    "teacher_logprobs": np.float32,
    "topk_ids": np.int32,
    "topk_logprobs": np.float32,
}


@dataclass(frozen=True)
class BatchSlice:
    """Samples `indices` of a batch, as ragged lists of arrays. `num_samples` counts the whole batch."""

    step: int
    weight_version: int
    num_samples: int
    indices: tuple[int, ...]
    sample_ids: tuple[str, ...]
    tokens: tuple[NDArray[np.int32], ...]  # each [P + L]
    prompt_lengths: tuple[int, ...]
    behavior_logprobs: tuple[NDArray[np.float32], ...]  # each [L]
    teacher_logprobs: tuple[NDArray[np.float32], ...]  # each [L]
    topk_ids: tuple[NDArray[np.int32], ...] | None  # each [L, K]
    topk_logprobs: tuple[NDArray[np.float32], ...] | None
    num_topk: int = 0  # K, also for a slice without samples; 0 when the batch has no top-K


@dataclass(frozen=True)
class BatchIndex:
    """Sizes, versions and teacher of every sample, without any token: what each rank needs to plan the packing."""

    step: int
    weight_version: int
    sample_ids: tuple[str, ...]
    sample_offsets: NDArray[np.int64]  # [N + 1]
    prompt_lengths: NDArray[np.int64]  # [N]
    response_offsets: NDArray[np.int64]  # [N + 1]
    token_versions: NDArray[np.int32]  # [sum L]
    teachers: tuple[str, ...]

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_offsets[-1])


@dataclass(frozen=True)
class WholeBatch:
    """The per-token arrays of all samples in batch order: small next to the tokens' activations.

    [sum L] unless said. Of a top-K, which is not small, only the teacher's entropy on request.
    """

    response_offsets: NDArray[np.int64]  # [N + 1]
    behavior_logprobs: NDArray[np.float32]
    teacher_logprobs: NDArray[np.float32]
    trainable: NDArray[np.uint8]
    token_versions: NDArray[np.int32]
    groups: NDArray[np.int32]  # [N]
    rewards: NDArray[np.float32] | None  # [N]
    teacher_entropy: NDArray[np.float32] | None
    kept_logmass: NDArray[np.float32] | None = None


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def _trainable(sample: Sample) -> NDArray[np.bool_]:
    length = len(sample.rollout.response_ids)
    if sample.trainable is None:
        return np.ones(length, dtype=np.bool_)
    if len(sample.trainable) != length:
        raise ContractError(
            f"sample {sample.rollout.sample_id}: trainable has {len(sample.trainable)} entries for "
            f"{length} response tokens"
        )
    return sample.trainable


def write_batch(path: Path, step: int, weight_version: int, samples: Sequence[Sample]) -> None:
    """Write a step batch atomically; beside the samples it takes the memory of one copy of them.

    Raises:
        ContractError: arrays of a sample disagree in length, or only some samples carry a top-K.
    """
    for sample in samples:
        length = len(sample.rollout.response_ids)
        for name, array in (
            ("behavior_logprobs", sample.rollout.behavior_logprobs),
            ("sampled_logprobs", sample.scores.sampled_logprobs),
            ("kept_logmass", sample.rollout.kept_logmass),
        ):
            if array is not None and len(array) != length:
                raise ContractError(
                    f"sample {sample.rollout.sample_id}: {name} has {len(array)} entries for "
                    f"{length} response tokens"
                )
    with_topk = [s.scores.topk_ids is not None for s in samples]
    if any(with_topk) and not all(with_topk):
        raise ContractError("some samples of the step batch carry teacher top-K and some do not")

    with_kept = [s.rollout.kept_logmass is not None for s in samples]
    if any(with_kept) and not all(with_kept):
        raise ContractError("some samples of the step batch were truncated and some were not")
    with_reward = [s.reward is not None for s in samples]
    if any(with_reward) and not all(with_reward):
        raise ContractError("some samples of the step batch carry a reward and some do not")
    numbers: dict[str, int] = {}

    def flat(arrays: list[NDArray], dtype: type) -> NDArray:
        if not arrays:
            return np.zeros(0, dtype)
        # With its dtype: a second copy of a top-K of millions of tokens would be gigabytes.
        return np.concatenate(arrays, dtype=dtype, casting="unsafe")

    tokens = [np.asarray(s.rollout.prompt_ids + s.rollout.response_ids) for s in samples]
    arrays: dict[str, NDArray] = {
        "sample_offsets": _offsets([len(t) for t in tokens]),
        "prompt_lengths": np.asarray([len(s.rollout.prompt_ids) for s in samples], dtype=np.int32),
        "tokens": flat(tokens, np.int32),
        "response_offsets": _offsets([len(s.rollout.response_ids) for s in samples]),
        "behavior_logprobs": flat([s.rollout.behavior_logprobs for s in samples], np.float32),
        "teacher_logprobs": flat([s.scores.sampled_logprobs for s in samples], np.float32),
        "trainable": flat([_trainable(s) for s in samples], np.uint8),
        "groups": np.asarray(
            [numbers.setdefault(s.group, len(numbers)) for s in samples], dtype=np.int32
        ),
        "token_versions": flat([s.rollout.token_versions for s in samples], np.int32),
    }
    if samples and all(with_kept):
        arrays["kept_logmass"] = flat([s.rollout.kept_logmass for s in samples], np.float32)  # type: ignore[misc]
    if samples and all(with_reward):
        arrays["rewards"] = np.asarray([s.reward for s in samples], dtype=np.float32)
    if samples and all(with_topk):
        arrays["topk_ids"] = flat([s.scores.topk_ids for s in samples], np.int32)  # type: ignore[misc]
        arrays["topk_logprobs"] = flat([s.scores.topk_logprobs for s in samples], np.float32)  # type: ignore[misc]
    metadata = {
        "format": FORMAT,
        "step": str(step),
        "weight_version": str(weight_version),
        "sample_ids": json.dumps([s.rollout.sample_id for s in samples]),
        "teachers": json.dumps([s.scores.teacher for s in samples]),
    }
    write_arrays(path, arrays, metadata)


def _checked_metadata(path: Path, file: Any) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ContractError(f"{path}: format {metadata.get('format')!r} is not {FORMAT!r}")
    return metadata


def read_index(path: Path) -> BatchIndex:
    """Read the offsets and versions of a batch.

    Raises:
        ContractError: not a step batch of this format.
    """
    with safe_open(path, framework="np") as file:
        metadata = _checked_metadata(path, file)
        return BatchIndex(
            step=int(metadata["step"]),
            weight_version=int(metadata["weight_version"]),
            sample_ids=tuple(json.loads(metadata["sample_ids"])),
            sample_offsets=file.get_tensor("sample_offsets"),
            prompt_lengths=file.get_tensor("prompt_lengths").astype(np.int64),
            response_offsets=file.get_tensor("response_offsets"),
            token_versions=file.get_tensor("token_versions"),
            teachers=tuple(json.loads(metadata["teachers"])),
        )


def read_whole(path: Path, *, entropy_of: EntropyOf | None = None) -> WholeBatch:
    """Read the per-token arrays of all samples.

    Args:
        entropy_of: [n, K] top-K log-probs to the teacher's entropy, [n]; for a batch with a top-K.

    Raises:
        ContractError: not a step batch of this format.
    """
    with safe_open(path, framework="np") as file:
        _checked_metadata(path, file)
        keys = set(file.keys())
        return WholeBatch(
            response_offsets=file.get_tensor("response_offsets"),
            behavior_logprobs=file.get_tensor("behavior_logprobs"),
            teacher_logprobs=file.get_tensor("teacher_logprobs"),
            trainable=file.get_tensor("trainable"),
            token_versions=file.get_tensor("token_versions"),
            groups=file.get_tensor("groups"),
            rewards=file.get_tensor("rewards") if "rewards" in keys else None,
            teacher_entropy=None
            if entropy_of is None or "topk_logprobs" not in keys
            else _by_pieces(file.get_slice("topk_logprobs"), entropy_of),
            kept_logmass=file.get_tensor("kept_logmass") if "kept_logmass" in keys else None,
        )


def _by_pieces(rows: Any, entropy_of: EntropyOf) -> NDArray[np.float32]:
    """Every rank does this, so the whole of it in memory would be there once for each rank of a machine."""
    length = rows.get_shape()[0]
    starts = range(0, length, _ROWS_AT_ONCE)
    parts = [entropy_of(rows[start : min(start + _ROWS_AT_ONCE, length)]) for start in starts]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def read_batch(path: Path, indices: Sequence[int] | None = None) -> BatchSlice:
    """Read the samples `indices` (None: all); other samples' token data is not read.

    Raises:
        ContractError: not a step batch of this format.
    """
    with safe_open(path, framework="np") as file:
        metadata = _checked_metadata(path, file)
        sample_offsets = file.get_tensor("sample_offsets")
        response_offsets = file.get_tensor("response_offsets")
        prompt_lengths = file.get_tensor("prompt_lengths")
        sample_ids = json.loads(metadata["sample_ids"])
        chosen = tuple(range(len(sample_ids)) if indices is None else indices)
        keys = set(file.keys())

        def cut(name: str, offsets: NDArray[np.int64]) -> tuple[NDArray, ...]:
            source = file.get_slice(name)
            # safetensors refuses an empty slice at the end of an array.
            empty = np.zeros((0, *source.get_shape()[1:]), _SLICED_DTYPES[name])
            borders = [(int(offsets[i]), int(offsets[i + 1])) for i in chosen]
            return tuple(source[a:b] if a < b else empty for a, b in borders)

        return BatchSlice(
            step=int(metadata["step"]),
            weight_version=int(metadata["weight_version"]),
            num_samples=len(sample_ids),
            indices=chosen,
            sample_ids=tuple(sample_ids[i] for i in chosen),
            tokens=cut("tokens", sample_offsets),
            prompt_lengths=tuple(int(prompt_lengths[i]) for i in chosen),
            behavior_logprobs=cut("behavior_logprobs", response_offsets),
            teacher_logprobs=cut("teacher_logprobs", response_offsets),
            topk_ids=cut("topk_ids", response_offsets) if "topk_ids" in keys else None,
            topk_logprobs=cut("topk_logprobs", response_offsets)
            if "topk_logprobs" in keys
            else None,
            num_topk=file.get_slice("topk_ids").get_shape()[1] if "topk_ids" in keys else 0,
        )
