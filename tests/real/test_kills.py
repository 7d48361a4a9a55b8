"""SIGKILL at random moments of whole runs, then `--resume`: no prompt is lost or trained twice.

The two kills that the ordinary suite makes are in test_whole_run.py. The seed and the number of kills may be given:
OPD_KILL_SEED, OPD_KILLS.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from kill_runs import ROLES, Outcome, draw_plans, kill_runs

pytestmark = [pytest.mark.real, pytest.mark.slow]
KILLS = int(os.environ.get("OPD_KILLS", "28"))


@pytest.mark.timeout(180 * KILLS)
def test_runs_survive_random_kills_of_every_role(tmp_path: Path) -> None:
    seed = int(os.environ.get("OPD_KILL_SEED", "0"))
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(outcome, flush=True)

    kill_runs(tmp_path, seed, draw_plans(seed, KILLS), report)
    assert len(outcomes) == KILLS
    counts = Counter(outcome.role for outcome in outcomes)
    assert all(counts[role] >= KILLS // len(ROLES) for role in ROLES)
