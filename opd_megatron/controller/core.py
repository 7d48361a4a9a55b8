"""The controller core: which action follows which event. A pure state machine, no IO, no clock, no randomness.

One step, strictly on-policy:

    Generate x prompts_per_step -> Score each group as it arrives -> Train -> SyncWeights
    -> Evaluate (every n) -> RecordStep -> Save (every n, and at the end) -> next step or Finish

A prompt whose group can not be used is rejected with a reason and replaced by the next one, so a step always
trains `prompts_per_step` prompts. A step the learner did not apply (NaN) rejects its prompts and is repeated with
new ones, `max_bad_steps` times in a row at most. Nothing here is done twice for one position: answers are matched
by (position, attempt).

With `max_staleness` above 0 the groups of later steps are asked for while a step trains; how many, and when a step has
to wait for a slow one, is arithmetic on versions (window.py). `update_in_flight` sends SyncWeights as soon as a step is
trained: rollouts under way go on with the new weights, and their tokens say which version wrote them. Without it,
SyncWeights waits until every rollout under way is there.

Where the responses are given (`publish_always` is false) no server needs the new weights before the next evaluation,
so SyncWeights comes only before an evaluation and at the end.

A request to stop (the machines will be taken away) drops all rollouts that do not train yet, which stay in flight in
the ledger and are issued again first; a step that is being trained is finished, with its evaluation. Then what
is not yet committed is saved, and the core suspends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from opd_megatron.controller.ledger import Ledger
from opd_megatron.controller.protocol import (
    Abort,
    Action,
    Evaluate,
    Evaluated,
    Event,
    Finish,
    Generate,
    Generated,
    PromptFailed,
    RecordStep,
    Save,
    Saved,
    Score,
    Scored,
    Started,
    StopRequested,
    Suspend,
    Synced,
    SyncWeights,
    Train,
    Trained,
)
from opd_megatron.controller.window import Window
from opd_megatron.types import Sample


@dataclass(frozen=True)
class CoreSettings:
    """The numbers of a recipe that the schedule depends on.

    `max_staleness` and `ahead` are those of `Window`; for `update_in_flight` see the module docstring.
    """

    steps: int
    prompts_per_step: int
    rollouts_per_prompt: int
    evaluate_every: int
    save_every: int
    max_attempts: int = 3
    max_bad_steps: int = 3
    max_rejected_per_step: int = 32
    publish_always: bool = True
    max_staleness: int = 0
    ahead: int | None = None
    update_in_flight: bool = False


class _Learner(Enum):
    """What the learner is needed for."""

    BOUNDARY = "between two steps: evaluation, record, commit"
    FREE = "waits for the groups of a step"
    TRAINING = "trains"
    DRAINING = "has trained; its weights wait for the rollouts under way"
    SYNCING = "gives its weights to the servers"


@dataclass
class _Group:
    """The rollouts of one prompt, from the request until they train.

    `version`: held by the servers when they were asked for; once they are there, the oldest that wrote a token.
    """

    attempt: int
    version: int
    generating: bool = True
    samples: tuple[Sample, ...] | None = None


class Core:
    """Feed it events with `on`, do the actions it returns, in any order.

    Args:
        settings: the schedule.
        state: the state of a commit to go on from, or None for a fresh run.
    """

    def __init__(self, settings: CoreSettings, state: dict[str, Any] | None = None) -> None:
        self.settings = settings
        self.step = 0 if state is None else int(state["step"])
        self.ledger = Ledger() if state is None else Ledger.from_state(state["ledger"])
        self.bad_steps = 0 if state is None else int(state["bad_steps"])
        self.evaluated_step = -1 if state is None else int(state["evaluated_step"])
        self.saved_step = self.recorded_step = -1 if state is None else self.step
        self.finished = False
        self._stopping = False
        self._window = Window(settings.prompts_per_step, settings.max_staleness, settings.ahead)
        self._learner = _Learner.BOUNDARY
        self._groups: dict[int, _Group] = {}
        self._training: tuple[int, ...] = ()
        self._trained_now: tuple[int, ...] = ()
        self._metrics: dict[str, float] = {}
        self._rejected_this_step = 0

    @property
    def version(self) -> int:
        """Weight version that every server holds, the number of applied steps; the learner may be one ahead."""
        return self.step

    def state(self) -> dict[str, Any]:
        """What a commit holds of the controller."""
        return {
            "step": self.step,
            "bad_steps": self.bad_steps,
            "evaluated_step": self.evaluated_step,
            "ledger": self.ledger.to_state(),
        }

    def on(self, event: Event) -> list[Action]:
        """Advance by one event and return the actions it causes."""
        if self.finished:
            return []
        match event:
            case Started():
                return self._after_step()
            case Generated():
                return self._generated(event)
            case Scored():
                return self._scored(event)
            case PromptFailed():
                return self._prompt_failed(event)
            case Trained():
                return self._trained(event)
            case Synced():
                return self._synced(event)
            case Evaluated():
                self.evaluated_step = event.step
                self._metrics = {**self._metrics, **event.metrics}
                return self._after_step()
            case Saved():
                self.saved_step = event.step
                return self._after_step()
            case StopRequested():
                return self._stop_requested()

    @property
    def nothing_left(self) -> bool:
        """The commit that this attempt goes on from was the last one: only the summary may be missing."""
        return self.settings.steps <= self.step == self.saved_step <= self.evaluated_step

    # ------------------------------------------------------------ one group of rollouts

    def _current(self, position: int, attempt: int) -> _Group | None:
        """The group that an answer is about, or None for an answer that comes late or twice."""
        group = self._groups.get(position)
        current = group is not None and group.attempt == attempt and group.samples is None
        return group if current else None

    def _generated(self, event: Generated) -> list[Action]:
        group = self._current(event.position, event.attempt)
        if group is None or not group.generating:
            return []
        oldest = min(rollout.version_first for rollout in event.rollouts)
        newest = max(rollout.version_last for rollout in event.rollouts)
        held = self.step + (self._learner is _Learner.SYNCING)
        if not group.version <= oldest <= newest <= held:
            return self._retry(event.position, f"stale: versions {oldest} to {newest}", "stale")
        group.version, group.generating = oldest, False
        return [Score(event.position, event.attempt, event.rollouts), *self._sync_if_drained()]

    def _scored(self, event: Scored) -> list[Action]:
        group = self._current(event.position, event.attempt)
        if group is None or group.generating:
            return []
        group.samples = event.samples
        return self._advance()

    def _prompt_failed(self, event: PromptFailed) -> list[Action]:
        if self._current(event.position, event.attempt) is None:
            return []
        if event.kind == "contract":
            return self._retry(event.position, event.message, "contract")
        return self._reject(event.position, event.kind, event.message)

    def _retry(self, position: int, message: str, reason: str) -> list[Action]:
        attempt = self._groups[position].attempt + 1
        if attempt > self.settings.max_attempts:
            return self._reject(position, reason, message)
        self._groups[position] = _Group(attempt, self.step)
        return [Generate(position, attempt)]

    def _reject(self, position: int, reason: str, message: str) -> list[Action]:
        del self._groups[position]
        self.ledger.reject(position, reason)
        self._rejected_this_step += 1
        if self._rejected_this_step > self.settings.max_rejected_per_step:
            return self._abort(
                f"step {self.step + 1}: {self._rejected_this_step} prompts rejected "
                f"({dict(self.ledger.rejected)}); last: {message}",
                retryable=False,
            )
        return [*self._advance(), *self._sync_if_drained()]

    def _fill(self) -> list[Action]:
        """Ask for the groups that there is room for."""
        if self._stopping:
            return []
        next_step = self.step + (1 if self._learner in (_Learner.BOUNDARY, _Learner.FREE) else 2)
        room = self._window.room(self.step, next_step, self.settings.steps, len(self._groups))
        positions = [self.ledger.issue() for _ in range(room)]
        self._groups.update((position, _Group(1, self.step)) for position in positions)
        return [Generate(position, 1) for position in positions]

    # ------------------------------------------------------------ the step

    def _advance(self) -> list[Action]:
        """Ask for what there is room for, and begin a step if the learner is free and its groups are there."""
        actions = self._fill()
        if self._learner is not _Learner.FREE:
            return actions
        ready: dict[int, int] = {}
        others: list[int] = []
        for position, group in self._groups.items():
            if group.samples is None:
                others.append(group.version)
            else:
                ready[position] = group.version
        positions = self._window.choose(self.step + 1, ready, others)
        if positions is None:
            return actions
        samples: list[Sample] = []
        for position in positions:
            samples += self._groups.pop(position).samples or ()
        self._training, self._learner = positions, _Learner.TRAINING
        train = Train(self.step + 1, self.step, positions, tuple(samples))
        return [*actions, train, *self._fill()]

    def _trained(self, event: Trained) -> list[Action]:
        if event.applied:
            self._metrics = {**event.metrics, "train/skipped": float(self.bad_steps)}
            self.bad_steps = 0
            if self.settings.publish_always or self._evaluates(event.step):
                self._learner = _Learner.DRAINING
                return self._sync_if_drained()
            return self._synced(Synced(event.step))
        self.bad_steps += 1
        for position in self._training:
            self.ledger.reject(position, "step_not_applied")
        self._training = ()
        if self.bad_steps >= self.settings.max_bad_steps:
            return self._abort(
                f"step {event.step} was not applied {self.bad_steps} times in a row: {event.why_not}",
                retryable=False,
            )
        return self._begin_step()

    def _sync_if_drained(self) -> list[Action]:
        """Give the new weights to the servers, unless they wait for rollouts under way."""
        if self._learner is not _Learner.DRAINING or self.finished:
            return []
        under_way = any(group.generating for group in self._groups.values())
        if under_way and not self.settings.update_in_flight:
            return []
        self._learner = _Learner.SYNCING
        return [SyncWeights(self.step + 1)]

    def _synced(self, event: Synced) -> list[Action]:
        self.step = event.version
        self._learner = _Learner.BOUNDARY
        self.ledger.train(self._training)
        self.ledger.check()
        self._trained_now, self._training = self._training, ()
        self._rejected_this_step = 0
        # Strictly on-policy, the evaluation has the servers for itself.
        asked = self._fill() if self.settings.max_staleness > 0 else []
        return [*asked, *self._after_step()]

    def _evaluates(self, step: int) -> bool:
        every = self.settings.evaluate_every
        return step >= self.settings.steps or step == 0 or (every > 0 and step % every == 0)

    def _after_step(self) -> list[Action]:
        """What the boundary between two steps still needs, in order, before the next step begins."""
        settings = self.settings
        last = self.step >= settings.steps
        if self._evaluates(self.step) and self.evaluated_step < self.step:
            return [Evaluate(self.step)]
        actions: list[Action] = []
        if self.recorded_step < self.step:
            actions.append(RecordStep(self.step, self._trained_now, self._metrics))
            self.recorded_step, self._trained_now, self._metrics = self.step, (), {}
        save = last or (self.step > 0 and self.step % settings.save_every == 0)
        if save and self.saved_step < self.step:
            return [*actions, Save(self.step, self.state())]
        if last:
            self.finished = True
            return [*actions, Finish()]
        return [*actions, *self._begin_step()]

    def _stop_requested(self) -> list[Action]:
        self._stopping, self._groups = True, {}
        if self._learner is _Learner.FREE:
            self._learner = _Learner.BOUNDARY
            return self._after_step()
        return self._sync_if_drained()

    def _begin_step(self) -> list[Action]:
        if self._stopping:
            self._learner = _Learner.BOUNDARY
            if self.step > max(self.saved_step, 0):
                return [Save(self.step, self.state())]
            self.finished = True
            return [Suspend()]
        self._learner = _Learner.FREE
        return self._advance()

    def _abort(self, message: str, retryable: bool) -> list[Action]:
        self.finished = True
        return [Abort(message, retryable)]
