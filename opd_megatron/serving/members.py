"""The servers of one role: in which state each is, how loaded, and which one gets the next request. No IO.

    STALE --admit--> IN_SERVICE --a failed request, another version--> OUT --it answers again--> STALE

Only a server in service gets requests. Between two of the same load the one that the prompt's hash prefers is taken,
so that a prompt that comes again (another try, an evaluation, the scores of one group) meets the prefix that the
server has cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from opd_megatron.serving.client import SglangClient


class State(Enum):
    """Where a server stands."""

    STALE = "stale"
    IN_SERVICE = "in service"
    OUT = "out"


@dataclass(eq=False)
class Member:
    """One server.

    Attributes:
        version: of the weights it was last proven to hold; what it answers must carry it.
        load: sequences in flight.
        broken_in_a_row: answers that broke the contract since the last good one.
        why_out: the error that took it out of service last.
    """

    client: SglangClient
    state: State = State.STALE
    version: int | None = None
    load: int = 0
    broken_in_a_row: int = 0
    why_out: str = ""

    @property
    def name(self) -> str:
        return self.client.name


@dataclass
class Counts:
    """What happened since the start. `failures`: requests that failed, by kind; each was sent to a server again or
    ended in an error."""

    failures: dict[str, int] = field(default_factory=dict[str, int])
    left: int = 0
    returned: int = 0

    def add(self, kind: str) -> None:
        self.failures[kind] = self.failures.get(kind, 0) + 1


def choose(
    members: Sequence[Member], prefix: Sequence[int], avoid: Collection[Member] = ()
) -> Member | None:
    """The member that gets a request, or None when none is in service.

    Args:
        prefix: ids of the prompt.
        avoid: members that failed this request before; taken only when there is no other.
    """
    in_service = [member for member in members if member.state is State.IN_SERVICE]
    candidates = [member for member in in_service if member not in avoid] or in_service
    if not candidates:
        return None
    least = min(member.load for member in candidates)
    free = [member for member in candidates if member.load == least]
    return max(free, key=lambda member: _preference(prefix, member.name))


def _preference(prefix: Sequence[int], name: str) -> bytes:
    """Rendezvous hashing: a server that leaves changes the choice of its own prompts only."""
    text = f"{name}:{','.join(map(str, prefix))}"
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
