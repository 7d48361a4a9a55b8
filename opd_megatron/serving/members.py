"""The servers of one role: in which state each is, how loaded, and which one gets the next request. No IO.

    STALE --admit--> IN_SERVICE --a failed request, another version--> OUT --it answers again--> STALE

Only a server in service gets requests. Between two of the same load the one that the prompt's hash prefers is taken,
so that a prompt that comes again (another try, an evaluation, the scores of one group) meets the prefix that the
server has cached. What goes on where another request ended (a conversation, a response in pieces) stays with the server
that has read it, however busy.
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
    members: Sequence[Member],
    prefix: Sequence[int],
    avoid: Collection[Member] = (),
    stay_with: str = "",
) -> Member | None:
    """The member that gets a request, or None when none is in service.

    Args:
        prefix: ids of the prompt.
        avoid: members that failed this request before; taken only when there is no other.
        stay_with: name of the server that has read most of the prompt already, if one has.
    """
    in_service = [member for member in members if member.state is State.IN_SERVICE]
    candidates = [member for member in in_service if member not in avoid] or in_service
    if not candidates:
        return None
    for member in candidates:
        if member.name == stay_with:
            return member
    least = min(member.load for member in candidates)
    free = [member for member in candidates if member.load == least]
    if len(free) == 1:
        return free[0]
    digest = hashlib.blake2b(repr(tuple(prefix)).encode(), digest_size=16).digest()
    return max(free, key=lambda member: _preference(digest, member.name))


def _preference(prefix_digest: bytes, name: str) -> bytes:
    """Rendezvous hashing: a server that leaves changes the choice of its own prompts only."""
    return hashlib.blake2b(prefix_digest + name.encode(), digest_size=8).digest()
