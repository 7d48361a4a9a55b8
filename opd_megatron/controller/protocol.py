"""Events that reach the controller core and actions it asks for. Plain values: no IO, no clocks.

`position` is a prompt position of the ledger; `attempt` numbers the tries for one position, so that a late
answer to an abandoned try is recognised and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opd_megatron.types import Rollout, Sample

# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Started:
    """Every role is up, weights of `CoreState.step` are on the servers, checks before step one passed."""


@dataclass(frozen=True)
class Generated:
    position: int
    attempt: int
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Scored:
    position: int
    attempt: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class PromptFailed:
    """One try for a prompt failed. kind: "refused" (4xx), "contract" (unusable answer)."""

    position: int
    attempt: int
    kind: str
    message: str


@dataclass(frozen=True)
class Trained:
    step: int
    applied: bool
    why_not: str | None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Synced:
    """Every rollout server holds and was verified to hold `version`."""

    version: int


@dataclass(frozen=True)
class Evaluated:
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    step: int


@dataclass(frozen=True)
class StopRequested:
    """The machines will be taken away soon: commit what there is and end."""


Event = (
    Started
    | Generated
    | Scored
    | PromptFailed
    | Trained
    | Synced
    | Evaluated
    | Saved
    | StopRequested
)

# ---------------------------------------------------------------- actions


@dataclass(frozen=True)
class Evaluate:
    step: int


@dataclass(frozen=True)
class Generate:
    position: int
    attempt: int


@dataclass(frozen=True)
class Score:
    position: int
    attempt: int
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Train:
    """Train step `step` (1-based) on samples generated with weight version `version`."""

    step: int
    version: int
    positions: tuple[int, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class SyncWeights:
    """Publish the learner's weights as `version` and bring every rollout server to it, verified."""

    version: int


@dataclass(frozen=True)
class RecordStep:
    """Step `step` is done: write its metrics row and ledger line. Step 0 is the untrained student."""

    step: int
    positions: tuple[int, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Save:
    """Commit a checkpoint that holds `state`."""

    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class Finish:
    """All steps are done and committed."""


@dataclass(frozen=True)
class Suspend:
    """Everything trained so far is committed; another attempt goes on from there."""


@dataclass(frozen=True)
class Abort:
    """Stop the run. `retryable` chooses exit code 75 over 78."""

    message: str
    retryable: bool


Action = (
    Evaluate | Generate | Score | Train | SyncWeights | RecordStep | Save | Finish | Suspend | Abort
)
