"""torch.compile for row functions: one version for all row counts, blocks and callers.

The compiler specialises on more than shapes: whether a tensor is a view, of what size its base is,
whether it requires a gradient. Blocks of rows are views of different things, so each would compile
again (seconds each). Therefore compiled code is handed plain tensors over the same memory, and one
row, which the compiler treats apart, runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, without base, offset, history or gradient, and with a storage of its own.

    So the compiler does not see it when a function reads and writes the same memory. Functions here
    write element v from what they read at v, which is safe.
    """
    return torch.from_dlpack(tensor.detach())  # pyright: ignore


@cache
def _compiled(function: Callable[..., Any], bound: tuple[Any, ...]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*bound, *arguments)

    # The compiler counts versions, up to a limit, by code object: every function gets its own.
    own = FunctionType(
        call.__code__.replace(), call.__globals__, function.__name__, None, call.__closure__
    )
    return torch.compile(own, dynamic=True)  # pyright: ignore


def run_compiled(
    function: Callable[..., Any], bound: tuple[Any, ...], block_TV: torch.Tensor, *arguments: Any
) -> Any:
    """function(*bound, block_TV, *arguments), compiled once a process for each (function, bound).

    Args:
        function: of the module level, so that it is the same object in every call.
        bound: hashable first arguments, constants of the compiled code.
        block_TV: the tensor whose rows are worked on.
        arguments: tensors or numbers.
    """
    if 1 in block_TV.shape:
        return function(*bound, block_TV, *arguments)
    tensors = (plain(x) if isinstance(x, torch.Tensor) else x for x in (block_TV, *arguments))
    return _compiled(function, bound)(*tensors)
