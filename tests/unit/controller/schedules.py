"""Seeded schedules for the controller core: a small world that plays servers, learner and disk, and breaks things.

One schedule is one run of a few steps, to its end. At every turn one thing that is under way comes to its end, drawn
from the seed, and the world may

    kill       the process, which goes on from its newest commit     restart    a server, which then answers with old
    hang       a request until nothing else moves; it then fails                weights until it is updated
    late       fail a try and let its answer come after all          update     servers one after the other, while
    duplicate  an answer, at once or later                                      rollouts are under way
    refuse     a prompt, a step (NaN)                                stop       ask the run to make room

`turn` checks the invariants after every event, against books that the world keeps for itself.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from opd_megatron.controller import protocol as p
from opd_megatron.controller.core import Core, CoreSettings
from opd_megatron.types import Rollout, Sample, TeacherScores

SERVERS = 2
_TWO = np.zeros(2, np.float32)


@lru_cache(maxsize=100_000)
def rollout(position: int, attempt: int, first: int, last: int) -> tuple[Rollout, ...]:
    """What a server makes of a prompt at one try; the try stands in the place of the server's name."""
    spans = () if first == last else ((first, 1), (last, 2))
    name = str(position)
    try_ = str(attempt)
    return (Rollout(f"{name}#0", name, (1,), (2, 3), _TWO, "stop", first, last, try_, spans=spans),)


@lru_cache(maxsize=100_000)
def _sample(position: int, attempt: int, first: int, last: int) -> tuple[Sample, ...]:
    return (Sample(rollout(position, attempt, first, last)[0], TeacherScores("main", _TWO)),)


def sample(rollouts: tuple[Rollout, ...]) -> tuple[Sample, ...]:
    made = rollouts[0]
    return _sample(int(made.prompt_id), int(made.server), made.version_first, made.version_last)


# Of each: max_staleness, ahead (in steps), update_in_flight.
MODES: dict[str, tuple[int, int | None, bool]] = {
    "sync": (0, None, False),
    "one_step_off": (1, 1, False),
    "async": (2, None, True),
    "async, drained": (2, None, False),
}


def settings_of(mode: str, steps: int, prompts: int, staleness: int | None = None) -> CoreSettings:
    bound, ahead, in_flight = MODES[mode]
    if staleness is not None and mode.startswith("async"):
        bound = staleness
    return CoreSettings(
        steps=steps,
        prompts_per_step=prompts,
        rollouts_per_prompt=1,
        evaluate_every=2,
        save_every=2,
        max_rejected_per_step=8,
        max_staleness=bound,
        ahead=None if ahead is None else ahead * prompts,
        update_in_flight=in_flight,
    )


def random_settings(rng: random.Random, mode: str) -> CoreSettings:
    prompts = 1 + int(rng.random() * 2)
    steps = 4 - prompts
    return replace(
        settings_of(mode, steps, prompts, 1 + int(rng.random() * 3)),
        save_every=1 + int(rng.random() * 2),
    )


class Broken(AssertionError):
    """An invariant does not hold."""


class World:
    """One schedule.

    Args:
        rng: the schedule.
        faults: multiplies how often things break; 0 for never.

    Attributes:
        fired: how often each fault was injected.
        trained: step -> positions, of the lineage that counts.
    """

    def __init__(self, settings: CoreSettings, rng: random.Random, faults: float = 1.0) -> None:
        self.settings = settings
        self.random = rng.random
        self.faults = faults
        self.fired: Counter[str] = Counter()
        self.commit: dict[str, Any] | None = None
        self.committed: dict[int, tuple[int, ...]] = {}
        self.boot()

    # ------------------------------------------------------------ processes

    def boot(self) -> None:
        """A new controller process; nothing of an earlier one answers any more."""
        self.core = Core(self.settings, self.commit)
        self.trained = dict(self.committed)
        self.held = [self.core.version] * SERVERS
        self.wrong = [False] * SERVERS
        # Of each request: its server, the version that it held then, the newest that all servers held.
        self.asked: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.pending: list[Any] = []
        self.hung: list[Any] = []
        self.training: p.Train | None = None
        self.updating: list[int] = []
        self.end: p.Finish | p.Abort | None = None
        state = self.commit
        self.expected = sorted(state["ledger"]["in_flight"]) if state else []
        self.next_new = state["ledger"]["next_position"] if state else 0
        self.take(self.core.on(p.Started()))

    def take(self, actions: list[p.Action]) -> None:
        for action in actions:
            kind = type(action)
            if kind is p.Generate:
                self._asked(action)  # type: ignore[arg-type]
                self.pending.append(action)
            elif kind is p.Train:
                self._check_batch(action)  # type: ignore[arg-type]
                self.training = action  # type: ignore[assignment]
                self.pending.append(action)
            elif kind is p.SyncWeights:
                self._check_drained()
                self.updating = list(range(SERVERS))
                self.pending.append(action)
            elif kind is p.RecordStep:
                if action.step:  # type: ignore[union-attr]
                    self.trained[action.step] = action.positions  # type: ignore[union-attr]
            elif kind is p.Finish or kind is p.Abort:
                self.end = action  # type: ignore[assignment]
            elif kind is p.Suspend:
                if self.committed != self.trained:
                    raise Broken("suspended with a trained step that is not committed")
                self.fired["suspend"] += 1
                self.boot()
                return
            else:
                self.pending.append(action)

    def _asked(self, action: p.Generate) -> None:
        server = int(self.random() * SERVERS)
        about = (server, self.held[server], self.core.step)
        self.asked[action.position, action.attempt] = about
        if action.attempt > 1:
            return
        # Those that were open at the commit first, in order; then new ones, in order.
        if self.expected:
            wanted = self.expected.pop(0)
        else:
            wanted, self.next_new = self.next_new, self.next_new + 1
        if action.position != wanted:
            raise Broken(f"issued {action.position}, not {wanted}")

    # ------------------------------------------------------------ one turn

    def run(self, turns: int = 3000) -> p.Finish | p.Abort:
        for _ in range(turns):
            self.turn()
            if self.end is not None:
                self._check_end()
                return self.end
        raise Broken("did not end")

    def turn(self) -> None:
        luck = self.random() / self.faults if self.faults else 1.0
        if luck < 0.04:
            if luck < 0.015:
                self.fired["kill"] += 1
                self.boot()
                return
            if luck < 0.02:
                self.fired["stop"] += 1
                self.event(p.StopRequested())
            elif luck < 0.04:
                self._restart()
        if not self.pending:
            if not self.hung:
                raise Broken("nothing is under way and the run is not over")
            self.pending, self.hung = self.hung, []
        todo = self.pending.pop(int(self.random() * len(self.pending)))
        kind = type(todo)
        if kind is p.Generate:
            self._generate(todo)
        elif kind is p.Score:
            self._score(todo)
        elif kind is p.Train:
            self.training = None
            refused = self._breaks(0.05, "NaN")
            self.event(p.Trained(todo.step, not refused, "NaN" if refused else None))
        elif kind is p.SyncWeights:
            self._sync(todo)
        elif kind is p.Evaluate:
            self.event(p.Evaluated(todo.step))
        elif kind is p.Save:
            self.commit = todo.state
            self.committed = dict(self.trained)
            self.event(p.Saved(todo.step))
        else:  # an event that comes late, or again
            self.event(todo)

    def event(self, event: p.Event) -> None:
        core = self.core
        self.take(core.on(event))
        ledger = core.ledger
        if ledger is not self.core.ledger:
            return
        closed = ledger.trained + sum(ledger.rejected.values())
        if ledger.issued != closed + len(ledger.in_flight):
            raise Broken("issued != trained + rejected + in flight")
        if ledger.trained != core.step * self.settings.prompts_per_step:
            raise Broken(f"{ledger.trained} prompts trained after {core.step} steps")

    def _breaks(self, rate: float, name: str) -> bool:
        broken = self.random() < rate * self.faults
        if broken:
            self.fired[name] += 1
        return broken

    def _restart(self) -> None:
        """A server holds old weights from here on, until the next update."""
        server = int(self.random() * SERVERS)
        if self.held[server] > 0 and not self.updating:
            self.fired["restart"] += 1
            self.wrong[server] = True

    def _generate(self, action: p.Generate) -> None:
        position, attempt = action.position, action.attempt
        server, begun, known = self.asked[position, attempt]
        failed = p.PromptFailed(position, attempt, "contract", "injected")
        if self._breaks(0.12, "request"):
            luck = self.random()
            if luck < 0.3:
                self.fired["hang"] += 1
                self.hung.append(failed)
                return
            if luck < 0.5:
                self.event(p.PromptFailed(position, attempt, "refused", "injected"))
                return
            self.event(failed)
            if luck < 0.8:
                self.fired["late"] += 1
                self.hung.append(
                    p.Generated(position, attempt, rollout(position, attempt, begun, begun))
                )
            return
        last = self.held[server]
        if self.wrong[server] and known > 0:
            self.fired["old weights"] += 1
            before = len(self.pending)
            old = rollout(position, attempt, known - 1, known - 1)
            self.event(p.Generated(position, attempt, old))
            if any(type(action) is p.Score for action in self.pending[before:]):
                raise Broken("scored what old weights wrote")
            return
        first = begun + int(self.random() * (last - begun + 1))
        if first < last:
            self.fired["update under way"] += 1
        answer = p.Generated(position, attempt, rollout(position, attempt, first, last))
        retries = len(self.asked)
        self.event(answer)
        if (position, attempt + 1) in self.asked and len(self.asked) > retries:
            raise Broken(f"rollouts of versions {first}..{last} were thrown away")
        self._again(answer)

    def _score(self, action: p.Score) -> None:
        position, attempt = action.position, action.attempt
        if self._breaks(0.08, "request"):
            self.event(p.PromptFailed(position, attempt, "contract", "injected"))
            return
        answer = p.Scored(position, attempt, sample(action.rollouts))
        self.event(answer)
        self._again(answer)

    def _again(self, answer: p.Event) -> None:
        if self._breaks(0.1, "duplicate"):
            if self.random() < 0.5:
                self.event(answer)
            else:
                self.pending.append(answer)

    def _sync(self, action: p.SyncWeights) -> None:
        """The next server; Synced when all of them hold the version."""
        server = self.updating.pop(int(self.random() * len(self.updating)))
        self.held[server], self.wrong[server] = action.version, False
        if self.updating:
            self.pending.append(action)
        else:
            self.event(p.Synced(action.version))

    # ------------------------------------------------------------ what must hold

    def _check_batch(self, train: p.Train) -> None:
        settings = self.settings
        if train.step != len(self.trained) + 1 or train.version != train.step - 1:
            raise Broken(f"step {train.step} at version {train.version} after {len(self.trained)}")
        if len(set(train.positions)) != settings.prompts_per_step:
            raise Broken(f"a step of {train.positions}")
        if [s.rollout.prompt_id for s in train.samples] != [str(q) for q in train.positions]:
            raise Broken("samples are not those of the positions")
        for done in self.trained.values():
            if set(done) & set(train.positions):
                raise Broken(f"{train.positions} trains again what {done} trained")
        for item in train.samples:
            newer = (int(item.rollout.prompt_id), int(item.rollout.server) + 1)
            if newer in self.asked:
                raise Broken(f"position {newer[0]}: trains the answer to a try that was given up")
            age = train.version - item.rollout.version_first
            if age > settings.max_staleness or item.rollout.version_last > train.version:
                raise Broken(f"age {age} with max_staleness {settings.max_staleness}")

    def _check_drained(self) -> None:
        if self.settings.update_in_flight:
            return
        for action in self.pending:
            if type(action) is p.Generate:
                group = self.core._groups.get(action.position)
                if group is not None and group.attempt == action.attempt and group.generating:
                    raise Broken("an update while rollouts are under way")

    def _check_end(self) -> None:
        ledger = self.core.ledger
        if isinstance(self.end, p.Abort):
            if "in a row" not in self.end.message and "rejected" not in self.end.message:
                raise Broken(self.end.message)
            return
        if list(self.trained) != list(range(1, self.settings.steps + 1)):
            raise Broken(f"steps {list(self.trained)}")
        positions = [q for done in self.trained.values() for q in done]
        if len(positions) != len(set(positions)) or ledger.in_flight:
            raise Broken("a prompt was doubled, or is still open")
        if ledger.issued != len(positions) + sum(ledger.rejected.values()):
            raise Broken("a prompt was lost")


def play(mode: str, seed: int, faults: float = 1.0) -> World:
    """One schedule from its seed; an error names the seed."""
    rng = random.Random(seed)
    world = World(random_settings(rng, mode), rng, faults)
    try:
        world.run()
    except AssertionError as error:
        error.add_note(f"mode {mode!r}, seed {seed}, faults {faults}: {world.settings}")
        raise
    return world
