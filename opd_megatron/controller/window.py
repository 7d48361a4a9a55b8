"""Which groups of rollouts may be asked for, and which may be trained, so that none gets older than the bound.

The age of a sample is the learner's version when it trains minus the version that wrote its oldest token. Step `s`
trains at version `s - 1`, so a group that is asked for while the servers hold version `f` has a deadline, the last
step that may train it:

    deadline(f) = f + 1 + max_staleness

Every step trains `size` groups. With the groups that are left sorted by deadline, the i-th of them trains in step
`next_step + i // size` at the latest, so nothing gets too old as long as

    next_step + i // size <= deadline of the i-th      for every i.                                        (1)

`room` asks for a group only if (1) still holds with it, and `choose` trains younger groups before older ones that
are not there yet only if (1) holds for those that stay. A step therefore waits for a slow group only when that group
would be too old afterwards, and no rollout is thrown away for its age: dropping the slow ones would leave the long
responses untrained. AReaL (arXiv 2505.24298) bounds the number of groups, which is (1) for groups that are there in the
order in which they were asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The rule for one run.

    Attributes:
        size: groups that a step trains.
        max_staleness: largest age of a sample, in versions; 0 is strictly on-policy.
        ahead: most groups asked for and not yet in training; None: as many as the bound allows.
    """

    size: int
    max_staleness: int = 0
    ahead: int | None = None

    def deadline(self, version: int) -> int:
        """The last step that may train what `version` wrote."""
        return version + 1 + self.max_staleness

    def room(self, held: int, next_step: int, last_step: int, waiting: int) -> int:
        """How many more groups may be asked for.

        Args:
            held: version that the servers hold, or an older one.
            next_step: the next step that begins to train.
            last_step: of the run: nothing is asked for beyond it.
            waiting: groups asked for and not in training.
        """
        limit = (min(self.deadline(held), last_step) - next_step + 1) * self.size
        if self.ahead is not None:
            limit = min(limit, self.ahead)
        return max(0, limit - waiting)

    def choose(
        self, step: int, ready: Mapping[int, int], others: Iterable[int]
    ) -> tuple[int, ...] | None:
        """Positions that step `step` trains, in order, or None when it has to wait.

        Args:
            ready: position -> oldest version, of the groups that are there.
            others: oldest version of each group that is not there yet.
        """
        if len(ready) < self.size:
            return None
        oldest_first = sorted(ready, key=lambda position: (ready[position], position))
        chosen, kept = oldest_first[: self.size], oldest_first[self.size :]
        left = sorted([*(ready[position] for position in kept), *others])
        if not self.is_feasible(step + 1, left):
            return None
        return tuple(sorted(chosen))

    def is_feasible(self, next_step: int, versions: Iterable[int]) -> bool:
        """Whether (1) holds for groups of these versions, given in ascending order."""
        return all(
            next_step + i // self.size <= self.deadline(version)
            for i, version in enumerate(versions)
        )
