"""The order of prompts: a pure function of (content hash, seed, epoch).

Position `p` of the endless stream is prompt `permutation(p // size)[p % size]`. So a resumed run
needs only the position, and two runs of the same data and seed see the same prompts on every
machine.

Domains that alternate take turns, in the order of their names, each with a permutation of its own: position `p` of D
domains is position `p // D` of domain `p % D`. A small domain begins its next epoch while a large one is in its first.

The permutation is our own Fisher-Yates over integers from SHAKE-256. `random.shuffle` and numpy's
generators promise no stable sequence between versions; a hash does. Drawing 64 bits modulo at most
`size` is biased by `size / 2**64`, which no training can notice.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

_BYTES_PER_DRAW = 8


def permutation(content_hash: str, seed: int, epoch: int, size: int) -> list[int]:
    """The order of one epoch: each of `0..size-1` once."""
    order = list(range(size))
    key = f"{content_hash}:{seed}:{epoch}".encode()
    draws = struct.unpack(f"<{size}Q", hashlib.shake_256(key).digest(_BYTES_PER_DRAW * size))
    for last in range(size - 1, 0, -1):
        other = draws[last] % (last + 1)
        order[last], order[other] = order[other], order[last]
    return order


class PromptOrder:
    """Maps positions of the endless stream of prompts to `(epoch, index)`.

    Args:
        content_hash: of the prompt set.
        seed: the run's seed.
        size: number of prompts, at least 1.
        shuffle: False keeps file order in every epoch.
    """

    def __init__(self, content_hash: str, seed: int, size: int, shuffle: bool) -> None:
        assert size > 0, "a prompt set is never empty"
        self._content_hash = content_hash
        self._seed = seed
        self._size = size
        self._shuffle = shuffle
        self._orders: dict[int, list[int]] = {}

    def index_at(self, position: int) -> tuple[int, int]:
        """`(epoch, index into the prompt set)` of `position >= 0`.

        Two epochs are kept in memory: prompts of both may be under way.
        """
        epoch, offset = divmod(position, self._size)
        if not self._shuffle:
            return epoch, offset
        if epoch not in self._orders:
            newest = dict(list(self._orders.items())[-1:])
            order = permutation(self._content_hash, self._seed, epoch, self._size)
            self._orders = {**newest, epoch: order}
        return epoch, self._orders[epoch][offset]


class AlternatingOrder:
    """`PromptOrder` of every domain, dealt in turn.

    Args:
        domains: of each prompt of the set; prompts without one are a domain of their own.
    """

    def __init__(
        self, content_hash: str, seed: int, domains: Sequence[str | None], shuffle: bool
    ) -> None:
        members: dict[str, list[int]] = {}
        for index, domain in enumerate(domains):
            members.setdefault(domain or "", []).append(index)
        self._indices = [members[name] for name in sorted(members)]
        self._orders = [
            PromptOrder(f"{content_hash}:{name}", seed, len(members[name]), shuffle)
            for name in sorted(members)
        ]

    def index_at(self, position: int) -> tuple[int, int]:
        """`(epoch of its domain, index into the prompt set)` of `position >= 0`."""
        turn, domain = divmod(position, len(self._orders))
        epoch, index = self._orders[domain].index_at(turn)
        return epoch, self._indices[domain][index]
