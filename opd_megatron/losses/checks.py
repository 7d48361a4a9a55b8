"""Input checks of the loss functions: cheap, local, and before any collective.

A bad tensor raises on the rank that holds it with its name, what was seen and what is wanted. The
checks never talk to other ranks, so a caller that can not stop its peers passes `allow_nan=True` to
`token_stats` and lets a NaN reach every rank through the sums instead.
"""

from __future__ import annotations

import torch

from opd_megatron.errors import NumericsError

LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LOGPROB_DTYPES = (torch.float32, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


class LossInputError(NumericsError, ValueError):
    """A tensor given to a loss has the wrong dtype, shape or values."""


def check_dtype(name: str, tensor: torch.Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor.dtype` is one of `wanted`.

    Raises:
        LossInputError: another dtype.
    """
    if tensor.dtype not in wanted:
        names = ", ".join(str(d).removeprefix("torch.") for d in wanted)
        raise LossInputError(
            f"{name}: dtype {str(tensor.dtype).removeprefix('torch.')} seen, one of {names} wanted"
        )


def check_device(name: str, tensor: torch.Tensor, wanted: torch.device) -> None:
    """Raise unless the tensor lies where the tensor lies that it is used with.

    Raises:
        LossInputError: another device.
    """
    if tensor.device != wanted:
        raise LossInputError(f"{name}: device {tensor.device} seen, {wanted} wanted")


def check_shape(name: str, tensor: torch.Tensor, wanted: tuple[int | str, ...]) -> None:
    """Raise unless the shape fits: an int must match exactly, a str names a free size.

    Raises:
        LossInputError: another number of dimensions or another size.
    """
    seen = tuple(tensor.shape)
    fits = len(seen) == len(wanted) and all(
        isinstance(w, str) or s == w for s, w in zip(seen, wanted, strict=True)
    )
    if not fits:
        want = ", ".join(str(w) for w in wanted)
        raise LossInputError(f"{name}: shape {list(seen)} seen, [{want}] wanted")


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Raise unless every id lies in [0, vocab_size).

    Raises:
        LossInputError: not an integer tensor, or an id outside the vocabulary.
    """
    check_dtype(name, ids, ID_DTYPES)
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        raise LossInputError(
            f"{name}: ids in [{low}, {high}] seen (shape {list(ids.shape)}), "
            f"[0, {vocab_size - 1}] wanted"
        )


def check_no_nan(name: str, tensor: torch.Tensor) -> None:
    """Raise if any entry is NaN; -inf and +inf pass.

    Raises:
        LossInputError: NaN, with the number of entries and the first position.
    """
    nan = torch.isnan(tensor)
    if bool(nan.any()):
        first = [int(i) for i in nan.nonzero()[0]]
        raise LossInputError(
            f"{name}: {int(nan.sum())} of {tensor.numel()} entries are NaN (shape "
            f"{list(tensor.shape)}, first at {first}), numbers wanted"
        )
