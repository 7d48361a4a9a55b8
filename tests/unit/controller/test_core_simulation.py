"""The controller core, strictly on-policy, under longer seeded schedules than those of test_overlap_simulation.py, and
what it does in single situations: actions finish in any order, prompts fail, steps are not applied, the process is
killed at any moment and resumed from its last commit.

Checked after every event and at the end: the ledger identity, no position trained twice in the lineage that
counts, every position below the low-water mark accounted for, each step trained with exactly its own version.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from opd_megatron.controller import protocol as p
from opd_megatron.controller.core import Core, CoreSettings
from opd_megatron.controller.ledger import Ledger, LedgerError
from opd_megatron.types import Rollout, Sample, TeacherScores

SETTINGS = CoreSettings(
    steps=7, prompts_per_step=3, rollouts_per_prompt=2, evaluate_every=3, save_every=2
)


def rollouts(position: int, version: int) -> tuple[Rollout, ...]:
    return tuple(
        Rollout(
            f"{position}#{k}", str(position), (1,), (2, 3), np.zeros(2, np.float32), "stop",
            version, version, "rollout-0",
        )
        for k in range(SETTINGS.rollouts_per_prompt)
    )  # fmt: skip


def samples(group: tuple[Rollout, ...]) -> tuple[Sample, ...]:
    return tuple(Sample(r, TeacherScores("main", np.zeros(2, np.float32))) for r in group)


class World:
    """Plays every role, with faults drawn from one seed. `lineage` is what the newest commit stands for."""

    def __init__(
        self,
        seed: int,
        fault_rate: float = 0.1,
        kill_rate: float = 0.02,
        stop_rate: float = 0.01,
        settings: CoreSettings = SETTINGS,
    ) -> None:
        self.settings = settings
        self.random = random.Random(seed)
        self.fault_rate, self.kill_rate, self.stop_rate = fault_rate, kill_rate, stop_rate
        self.suspensions = 0
        self.commit: dict | None = None
        self.committed_lineage: list[tuple[int, tuple[int, ...]]] = []
        self.kills = 0
        self.boot()

    def boot(self) -> None:
        self.core = Core(self.settings, copy.deepcopy(self.commit))
        self.lineage = list(self.committed_lineage)
        self.server_version = self.core.version
        self.pending: list[p.Action] = []
        self.outcome: p.Finish | p.Abort | None = None
        self.suspended = False
        self.take(self.core.on(p.Started()))

    def take(self, actions: list[p.Action]) -> None:
        for action in actions:
            if isinstance(action, p.RecordStep):
                if action.step:
                    self.lineage.append((action.step, action.positions))
            elif isinstance(action, p.Finish | p.Abort):
                self.outcome = action
            elif isinstance(action, p.Suspend):
                # Nothing that was trained may be missing from the commit.
                assert self.committed_lineage == self.lineage
                self.suspensions += 1
                self.suspended = True
            else:
                self.pending.append(action)

    def answer(self, action: p.Action) -> list[p.Event]:
        fault = self.random.random() < self.fault_rate
        match action:
            case p.Generate(position, attempt):
                if fault:
                    kind = self.random.choice(["refused", "contract"])
                    return [p.PromptFailed(position, attempt, kind, "injected")]
                if not self.settings.publish_always:  # given responses are of the trained version
                    return [p.Generated(position, attempt, rollouts(position, self.core.version))]
                stale = self.random.random() < self.fault_rate / 2
                version = self.server_version - 1 if stale else self.server_version
                event = p.Generated(position, attempt, rollouts(position, version))
                return [event, event] if self.random.random() < self.fault_rate else [event]
            case p.Score(position, attempt, group):
                if fault:
                    return [p.PromptFailed(position, attempt, "contract", "injected")]
                event = p.Scored(position, attempt, samples(group))
                return [event, event] if self.random.random() < self.fault_rate else [event]
            case p.Train(step, version, positions, batch):
                assert version == self.core.version == step - 1
                assert len(positions) == SETTINGS.prompts_per_step
                assert len(batch) == SETTINGS.prompts_per_step * SETTINGS.rollouts_per_prompt
                assert {s.rollout.version_first for s in batch} == {version}
                applied = not fault
                return [p.Trained(step, applied, None if applied else "NaN", {"train/loss": 1.0})]
            case p.SyncWeights(version):
                self.server_version = version
                return [p.Synced(version)]
            case p.Evaluate(step):
                assert self.server_version == step, "an evaluation measures the newest weights"
                return [p.Evaluated(step, {"eval/heldout/accuracy": 0.5})]
            case p.Save(step, state):
                self.commit = copy.deepcopy(state)
                self.committed_lineage = list(self.lineage)
                return [p.Saved(step)]
        raise AssertionError(action)

    def run(self) -> p.Finish | p.Abort:
        for _ in range(20_000):
            if self.outcome is not None:
                return self.outcome
            assert self.pending, "nothing to do and not finished: the core is stuck"
            if self.random.random() < self.kill_rate:
                self.kills += 1
                self.boot()
                continue
            if self.random.random() < self.stop_rate:
                self.take(self.core.on(p.StopRequested()))
            if self.suspended:
                self.boot()
                continue
            action = self.pending.pop(self.random.randrange(len(self.pending)))
            for event in self.answer(action):
                self.take(self.core.on(event))
                self.core.ledger.check()
            if self.suspended:
                self.boot()
        raise AssertionError("did not end")


@pytest.mark.parametrize("publish_always", [True, False])
def test_every_schedule_ends_with_each_prompt_trained_once(publish_always: bool) -> None:
    outcomes: Counter[str] = Counter()
    kills = suspensions = 0
    for seed in range(250):
        world = World(seed, settings=replace(SETTINGS, publish_always=publish_always))
        outcome = world.run()
        kills += world.kills
        suspensions += world.suspensions
        outcomes[type(outcome).__name__] += 1
        if isinstance(outcome, p.Abort):
            assert "in a row" in outcome.message
            continue
        assert [step for step, _ in world.lineage] == list(range(1, SETTINGS.steps + 1)), seed
        trained = [position for _, positions in world.lineage for position in positions]
        assert len(trained) == len(set(trained)), f"seed {seed}: trained twice"
        ledger = world.core.ledger
        assert ledger.trained == len(trained)
        assert ledger.in_flight == frozenset()
        assert ledger.issued == len(trained) + sum(ledger.rejected.values())
        assert set(trained) <= set(range(ledger.issued))
    assert kills > 100 and suspensions > 100, "the faults must fire"
    assert outcomes["Finish"] > 200


def test_without_faults_positions_are_trained_in_order() -> None:
    world = World(seed=1, fault_rate=0.0, kill_rate=0.0, stop_rate=0.0)
    assert isinstance(world.run(), p.Finish)
    assert [positions for _, positions in world.lineage] == [
        (3 * s, 3 * s + 1, 3 * s + 2) for s in range(SETTINGS.steps)
    ]


def test_weights_of_given_responses_are_published_for_evaluations_and_at_the_end_only() -> None:
    settings = replace(SETTINGS, publish_always=False)
    world = World(seed=1, fault_rate=0.0, kill_rate=0.0, stop_rate=0.0, settings=settings)
    honest, published = world.answer, []

    def answer(action: p.Action) -> list[p.Event]:
        if isinstance(action, p.SyncWeights):
            published.append(action.version)
        return honest(action)

    world.answer = answer  # type: ignore[method-assign]
    assert isinstance(world.run(), p.Finish)
    assert published == [3, 6, 7]


def test_a_stop_while_prompts_are_out_commits_at_once_and_keeps_them_in_flight() -> None:
    core = Core(SETTINGS)
    core.step, core.recorded_step, core.evaluated_step = 1, 1, 1
    issued = core.on(p.Started())
    assert [type(action) for action in issued] == [p.Generate] * SETTINGS.prompts_per_step
    (save,) = core.on(p.StopRequested())
    assert isinstance(save, p.Save)
    assert save.state["ledger"]["in_flight"] == [0, 1, 2]
    assert core.on(p.Generated(0, 1, rollouts(0, 1))) == []
    assert core.on(p.Saved(1)) == [p.Suspend()]
    resumed = Core(SETTINGS, copy.deepcopy(save.state))
    assert resumed.on(p.Started()) == issued


def test_a_stop_before_the_first_step_saves_nothing() -> None:
    core = Core(SETTINGS)
    assert core.on(p.Started()) == [p.Evaluate(0)]
    assert core.on(p.StopRequested()) == []
    assert core.on(p.Evaluated(0))[-1:] == [p.Suspend()]


def test_steps_not_applied_in_a_row_stop_the_run_with_the_reason() -> None:
    world = World(seed=1, fault_rate=0.0, kill_rate=0.0, stop_rate=0.0)
    honest = world.answer

    def poisoned(action: p.Action) -> list[p.Event]:
        if isinstance(action, p.Train):
            return [p.Trained(action.step, False, "grad_norm is NaN on rank 1")]
        return honest(action)

    world.answer = poisoned  # type: ignore[method-assign]
    outcome = world.run()
    assert isinstance(outcome, p.Abort)
    assert "grad_norm is NaN on rank 1" in outcome.message
    assert world.core.ledger.rejected["step_not_applied"] == 9


def test_updates_that_were_not_applied_are_counted_in_the_row_of_the_step() -> None:
    world = World(seed=1, fault_rate=0.0, kill_rate=0.0, stop_rate=0.0)
    honest, recorded = world.answer, []

    def poisoned_once(action: p.Action) -> list[p.Event]:
        if isinstance(action, p.Train) and action.step == 2 and world.core.bad_steps == 0:
            return [p.Trained(action.step, False, "grad_norm is NaN on rank 1")]
        return honest(action)

    take = world.take

    def take_and_keep(actions: list[p.Action]) -> None:
        recorded.extend(action for action in actions if isinstance(action, p.RecordStep))
        take(actions)

    world.answer, world.take = poisoned_once, take_and_keep  # type: ignore[method-assign]
    assert isinstance(world.run(), p.Finish)
    skipped = {record.step: record.metrics.get("train/skipped") for record in recorded}
    assert skipped == {
        0: None,
        2: 1.0,
        **dict.fromkeys((1, *range(3, SETTINGS.steps + 1)), 0.0),
    }


def test_a_step_in_which_every_prompt_is_refused_stops_the_run() -> None:
    world = World(seed=1, fault_rate=0.0, kill_rate=0.0, stop_rate=0.0)
    honest = world.answer

    def refuse(action: p.Action) -> list[p.Event]:
        if isinstance(action, p.Generate):
            return [p.PromptFailed(action.position, action.attempt, "refused", "too long")]
        return honest(action)

    world.answer = refuse  # type: ignore[method-assign]
    outcome = world.run()
    assert isinstance(outcome, p.Abort)
    assert "too long" in outcome.message


def test_a_late_answer_to_an_abandoned_try_is_dropped() -> None:
    core = Core(SETTINGS)
    core.on(p.Started())
    core.on(p.Evaluated(0))
    retry = core.on(p.PromptFailed(0, 1, "contract", "cut"))
    assert retry == [p.Generate(0, 2)]
    assert core.on(p.Generated(0, 1, rollouts(0, 0))) == []
    (action,) = core.on(p.Generated(0, 2, rollouts(0, 0)))
    assert isinstance(action, p.Score) and action.attempt == 2


def test_rollouts_of_another_version_are_never_scored() -> None:
    core = Core(SETTINGS)
    core.on(p.Started())
    core.on(p.Evaluated(0))
    assert core.on(p.Generated(0, 1, rollouts(0, 7))) == [p.Generate(0, 2)]


def test_closing_a_position_twice_is_a_defect_that_is_noticed() -> None:
    ledger = Ledger()
    position = ledger.issue()
    ledger.train([position])
    with pytest.raises(LedgerError):
        ledger.reject(position, "late")


def test_positions_in_flight_at_a_commit_are_issued_again_first() -> None:
    ledger = Ledger()
    for _ in range(5):
        ledger.issue()
    ledger.train([0, 2])
    resumed = Ledger.from_state(ledger.to_state())
    assert [resumed.issue() for _ in range(4)] == [1, 3, 4, 5]
    resumed.check()
