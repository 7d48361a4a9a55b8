"""The controller core: which action follows which event. A pure state machine, no IO, no clock, no randomness.

One step, strictly on-policy:

    Generate x prompts_per_step -> Score each group as it arrives -> Train -> SyncWeights
    -> Evaluate (every n) -> RecordStep -> Save (every n, and at the end) -> next step or Finish

A prompt whose group can not be used is rejected with a reason and replaced by the next one, so a step always
trains `prompts_per_step` prompts. A step the learner did not apply (NaN) rejects its prompts and is repeated with
new ones, `max_bad_steps` times in a row at most. Nothing here is done twice for one position: answers are matched
by (position, attempt).

Where the responses are given (`publish_always` is false) no server needs the new weights before the next evaluation,
so SyncWeights comes only before an evaluation and at the end. Asynchronous (off-policy) schedules are left out of this
version.

A request to stop (the machines will be taken away) drops the rollouts of the step under way, which stay in flight in
the ledger and are issued again first; a step that is being trained is finished, with its evaluation. Then what
is not yet committed is saved, and the core suspends.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from opd_megatron.types import Sample


@dataclass(frozen=True)
class CoreSettings:
    """The numbers of a recipe that the schedule depends on."""

    steps: int
    prompts_per_step: int
    rollouts_per_prompt: int
    evaluate_every: int
    save_every: int
    max_attempts: int = 3
    max_bad_steps: int = 3
    max_rejected_per_step: int = 32
    publish_always: bool = True


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
        self._stopping = self._collecting = False
        self._attempts: dict[int, int] = {}
        self._ready: dict[int, tuple[Sample, ...]] = {}
        self._training: tuple[int, ...] = ()
        self._trained_now: tuple[int, ...] = ()
        self._metrics: dict[str, float] = {}
        self._rejected_this_step = 0

    @property
    def version(self) -> int:
        """Weight version of the learner, the number of applied steps; servers that are asked hold it too."""
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

    def _issue(self) -> Generate:
        position = self.ledger.issue()
        self._attempts[position] = 1
        return Generate(position, 1)

    def _is_current(self, position: int, attempt: int) -> bool:
        return self._attempts.get(position) == attempt

    def _generated(self, event: Generated) -> list[Action]:
        if not self._is_current(event.position, event.attempt):
            return []
        versions = {v for r in event.rollouts for v in (r.version_first, r.version_last)}
        if versions != {self.version}:
            return self._retry(event.position, f"stale: versions {sorted(versions)}", "stale")
        return [Score(event.position, event.attempt, event.rollouts)]

    def _scored(self, event: Scored) -> list[Action]:
        if not self._is_current(event.position, event.attempt):
            return []
        del self._attempts[event.position]
        self._ready[event.position] = event.samples
        if len(self._ready) < self.settings.prompts_per_step:
            return []
        positions = tuple(sorted(self._ready))
        samples = tuple(sample for p in positions for sample in self._ready[p])
        self._training, self._ready, self._collecting = positions, {}, False
        return [Train(self.step + 1, self.version, positions, samples)]

    def _prompt_failed(self, event: PromptFailed) -> list[Action]:
        if not self._is_current(event.position, event.attempt):
            return []
        if event.kind == "contract":
            return self._retry(event.position, event.message, "contract")
        return self._reject(event.position, event.kind, event.message)

    def _retry(self, position: int, message: str, reason: str) -> list[Action]:
        attempt = self._attempts[position] + 1
        if attempt > self.settings.max_attempts:
            return self._reject(position, reason, message)
        self._attempts[position] = attempt
        return [Generate(position, attempt)]

    def _reject(self, position: int, reason: str, message: str) -> list[Action]:
        del self._attempts[position]
        self.ledger.reject(position, reason)
        self._rejected_this_step += 1
        if self._rejected_this_step > self.settings.max_rejected_per_step:
            return self._abort(
                f"step {self.step + 1}: {self._rejected_this_step} prompts rejected "
                f"({dict(self.ledger.rejected)}); last: {message}",
                retryable=False,
            )
        return [self._issue()]

    # ------------------------------------------------------------ the step

    def _trained(self, event: Trained) -> list[Action]:
        if event.applied:
            self._metrics = {**event.metrics, "train/skipped": float(self.bad_steps)}
            self.bad_steps = 0
            if self.settings.publish_always or self._evaluates(event.step):
                return [SyncWeights(event.step)]
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

    def _synced(self, event: Synced) -> list[Action]:
        self.step = event.version
        self.ledger.train(self._training)
        self.ledger.check()
        self._trained_now, self._training = self._training, ()
        self._rejected_this_step = 0
        return self._after_step()

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
        was_collecting, self._stopping = self._collecting, True
        if not was_collecting:
            return []
        self._attempts, self._ready, self._collecting = {}, {}, False
        return self._after_step()

    def _begin_step(self) -> list[Action]:
        if self._stopping:
            if self.step > max(self.saved_step, 0):
                return [Save(self.step, self.state())]
            self.finished = True
            return [Suspend()]
        self._collecting = True
        return [self._issue() for _ in range(self.settings.prompts_per_step)]

    def _abort(self, message: str, retryable: bool) -> list[Action]:
        self.finished = True
        return [Abort(message, retryable)]
