"""The prompt ledger: every prompt that was issued is trained once, rejected with a reason, or in flight.

A prompt is named by its *position* in the infinite, deterministic order of `data/order.py`. Identity, checked at
every commit:

    issued = trained + rejected(by reason) + in flight

A position counts as trained only when the step that trained it is committed. The state holds the low-water mark
and what is open above it, never a read position of a generator, so a resumed run re-issues exactly what was open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


class LedgerError(AssertionError):
    """The ledger's own identity is broken: a defect of this project, never a user's fault."""


class Ledger:
    """Accounts for prompt positions. Not thread-safe; owned by the controller core."""

    def __init__(self) -> None:
        self.next_position = 0
        self.trained = 0
        self.rejected: Counter[str] = Counter()
        self._in_flight: set[int] = set()
        self._reissue: list[int] = []

    @property
    def issued(self) -> int:
        """Positions handed out so far, each counted once however often it was re-issued."""
        return self.next_position

    @property
    def in_flight(self) -> frozenset[int]:
        return frozenset(self._in_flight) | frozenset(self._reissue)

    def issue(self) -> int:
        """Hand out the next position: first those open at the last commit, then new ones."""
        if self._reissue:
            position = self._reissue.pop(0)
        else:
            position = self.next_position
            self.next_position += 1
        self._in_flight.add(position)
        return position

    def _close(self, position: int) -> None:
        if position not in self._in_flight:
            raise LedgerError(f"position {position} is not in flight")
        self._in_flight.remove(position)

    def reject(self, position: int, reason: str) -> None:
        """Close a position without training it; `reason` is counted."""
        self._close(position)
        self.rejected[reason] += 1

    def train(self, positions: Iterable[int]) -> None:
        """Close the positions of one committed step."""
        for position in positions:
            self._close(position)
            self.trained += 1

    def check(self) -> None:
        """Verify the identity.

        Raises:
            LedgerError: it does not hold.
        """
        total = self.trained + sum(self.rejected.values()) + len(self.in_flight)
        if total != self.issued:
            raise LedgerError(
                f"issued {self.issued} != trained {self.trained} + rejected {dict(self.rejected)} "
                f"+ in flight {len(self.in_flight)}"
            )

    def to_state(self) -> dict[str, Any]:
        """JSON-ready state for a commit."""
        self.check()
        return {
            "next_position": self.next_position,
            "trained": self.trained,
            "rejected": dict(self.rejected),
            "in_flight": sorted(self.in_flight),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Ledger:
        """Rebuild from a commit; positions in flight then are issued again first, in order."""
        ledger = cls()
        ledger.next_position = int(state["next_position"])
        ledger.trained = int(state["trained"])
        ledger.rejected = Counter(state["rejected"])
        ledger._reissue = sorted(int(p) for p in state["in_flight"])
        ledger.check()
        return ledger
