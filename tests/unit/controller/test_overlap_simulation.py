"""100,000 seeded schedules of the controller core over all modes, and proof that the invariants would notice.

OPD_SCHEDULES=N runs N of them instead (10 million: a weekly run). A failure names its mode and seed;
`schedules.play(mode, seed)` replays it.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest
from schedules import MODES, Broken, World, play, settings_of

from opd_megatron.controller import core as core_module
from opd_megatron.controller import protocol as p
from opd_megatron.controller.core import Core
from opd_megatron.controller.ledger import Ledger
from opd_megatron.controller.window import Window

SCHEDULES = int(os.environ.get("OPD_SCHEDULES", "100000"))
FAULTS = {
    *("kill", "stop", "suspend", "request", "hang", "late", "duplicate", "NaN", "restart"),
    "old weights",
}


@pytest.mark.many
@pytest.mark.timeout(max(120, SCHEDULES // 500))
@pytest.mark.parametrize("mode", MODES)
def test_every_schedule_ends_with_each_prompt_trained_once(mode: str) -> None:
    outcomes: Counter[str] = Counter()
    fired: Counter[str] = Counter()
    count = SCHEDULES // len(MODES)
    for seed in range(count):
        world = play(mode, seed)
        fired += world.fired
        outcomes[type(world.end).__name__] += 1
    assert outcomes["Finish"] > 0.99 * count
    wanted = FAULTS | ({"update under way"} if mode == "async" else set())
    rare = {name: fired[name] for name in wanted if fired[name] < 0.01 * count}
    assert not rare, "these faults hardly fired"


@pytest.mark.parametrize("mode", MODES)
def test_without_faults_no_prompt_is_rejected_and_no_rollout_thrown_away(mode: str) -> None:
    for seed in range(500):
        world = play(mode, seed, faults=0.0)
        assert isinstance(world.end, p.Finish)
        assert not world.core.ledger.rejected
        assert all(attempt == 1 for _, attempt in world.asked)


def _backwards(ledger: Ledger) -> Ledger:
    ledger._reissue = ledger._reissue[::-1]
    return ledger


def _lost(ledger: Ledger) -> Ledger:
    if ledger._reissue:
        ledger._reissue.pop()
        ledger.trained += 1
    return ledger


from_state = Ledger.from_state
BROKEN: dict[str, tuple[type, str, object]] = {
    "one version too old is let through": (
        Window,
        "deadline",
        lambda self, version: version + 2 + self.max_staleness,
    ),
    "steps do not wait for slow groups": (Window, "is_feasible", lambda self, step, left: True),
    "young groups first": (
        Window,
        "choose",
        lambda self, step, ready, others: (
            tuple(sorted(sorted(ready, key=lambda q: -ready[q])[: self.size]))
            if len(ready) >= self.size
            else None
        ),
    ),
    "answers are matched by position alone": (
        Core,
        "_current",
        lambda self, position, attempt: self._groups.get(position),
    ),
    "resumed in another order": (
        Ledger,
        "from_state",
        classmethod(lambda cls, state: _backwards(from_state(state))),
    ),
    "a prompt lost at a resume": (
        Ledger,
        "from_state",
        classmethod(lambda cls, state: _lost(from_state(state))),
    ),
    "the bound is not applied to old weights": (
        core_module,  # type: ignore[dict-item]
        "min",
        lambda versions: max([*versions, 99]),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_build_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken, raising=False)
    with pytest.raises(AssertionError):
        for seed in range(1500):
            for mode in MODES:
                play(mode, seed)


def test_an_update_while_rollouts_are_under_way_is_caught_where_it_may_not_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def at_once(core: Core) -> list[p.Action]:
        if core._learner.name != "DRAINING":
            return []
        core._learner = type(core._learner)["SYNCING"]
        return [p.SyncWeights(core.step + 1)]

    monkeypatch.setattr(Core, "_sync_if_drained", at_once)
    with pytest.raises(Broken, match="under way"):
        for seed in range(1500):
            play("one_step_off", seed)


def _log(world: World) -> list[str]:
    """What the core asks for, in order, until the run ends."""
    seen: list[str] = []
    take: Callable[[list[p.Action]], None] = world.take

    def keep(actions: list[p.Action]) -> None:
        for action in actions:
            number = getattr(action, "position", getattr(action, "step", None))
            number = getattr(action, "version", number) if number is None else number
            seen.append(f"{type(action).__name__} {number}")
        take(actions)

    world.take = keep  # type: ignore[method-assign]
    world.run()
    return seen


def test_one_step_off_asks_for_the_next_step_when_one_begins_to_train() -> None:
    world = World(settings_of("one_step_off", 3, 2), random.Random(0), faults=0.0)
    seen = _log(world)
    for step in (1, 2):
        begun = seen.index(f"Train {step}")
        assert seen[begun + 1 : begun + 3] == [f"Generate {2 * step}", f"Generate {2 * step + 1}"]
    assert not any(name.startswith("Generate") for name in seen[seen.index("Train 3") :])
