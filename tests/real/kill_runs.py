"""Kills whole runs at random moments and resumes them until they are done, checking everything in between.

    python tests/real/kill_runs.py --kills 24 --seed 0 --folder DIR [--table FILE]

One kill: start or resume a run, wait for a random moment, SIGKILL a random role (or everything), see how the run
ends, check commits and processes, go on. `Plan` is drawn from the seed alone; the exact instant is the machine's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from whole_runs import (
    SMALL,
    check_commits,
    check_finished,
    check_nothing_runs,
    members,
    of_role,
    rows,
    start,
    wait_until,
)

from opd_megatron.rundir import RunDir

STEPS = 6
ROLES = ("controller", "agent", "rank", "rollout", "teacher", "supervisor", "everything")
MOMENTS = ("start", "ready", "commit", "publication", "evaluation", "training", "end")
# Seconds after the moment begins within which the kill falls.
_SPREAD_S = {
    "start": 20.0,
    "ready": 2.0,
    "commit": 0.06,
    "publication": 0.05,
    "evaluation": 0.4,
    "training": 0.1,
    "end": 0.5,
}
_WORDS = {
    "controller": "controller ended with signal SIGKILL",
    "agent": "learner ended with signal SIGKILL",
    "rank": "learner ended with",
    "rollout": "rollout-0 ended with",
    "teacher": "teacher-main-0 ended with",
}


@dataclass(frozen=True)
class Plan:
    """`after_steps`: how many steps the attempt must have recorded before the moment counts."""

    role: str
    moment: str
    delay_frac: float
    after_steps: int = 0


def draw_plans(seed: int, kills: int) -> list[Plan]:
    """Every role in turn in shuffled rounds, each with a random moment."""
    rng = random.Random(seed)
    plans: list[Plan] = []
    while len(plans) < kills:
        roles = list(ROLES)
        rng.shuffle(roles)
        plans += [
            Plan(role, rng.choice(MOMENTS), rng.random(), rng.randrange(STEPS - 1))
            for role in roles
        ]
    return plans[:kills]


@dataclass(frozen=True)
class Outcome:
    """One row of the table. `code` is None when the supervisor itself was killed."""

    number: int
    role: str
    moment: str
    after_steps: int
    after_s: float
    code: int | None
    ended_s: float
    commit_before: int
    commit_after: int
    result: str


def _moment(run: RunDir, plan: Plan, attempts_before: int) -> Callable[[], bool]:
    """A condition that turns true when the moment begins in the attempt that was just started."""

    def newest() -> Path | None:
        numbers = run.attempts()
        return run.attempt(numbers[-1]).root if len(numbers) > attempts_before else None

    def sees(pattern: str) -> bool:
        root = newest()
        return root is not None and any(root.glob(pattern))

    weights = {path.name for path in run.weights.glob("v*")}

    def has_done(count: int) -> bool:
        done = sum(
            row["attempt"] > attempts_before and row["step"] > 0 for row in rows(run.metrics)
        )
        return done >= count

    conditions: dict[str, Callable[[], bool]] = {
        "start": lambda: newest() is not None,
        "ready": lambda: sees("batches/preflight.safetensors"),
        "commit": lambda: sees("batches") and any(run.checkpoints.glob(".step_*.tmp")),
        "publication": lambda: sees("batches") and any(run.weights.glob(".v*.tmp")),
        "evaluation": lambda: any(p.name not in weights for p in run.weights.glob("v*[02468]")),
        "training": lambda: sees("batches/step_*.safetensors"),
        "end": lambda: sees("finishing"),
    }
    happens = conditions[plan.moment]
    if plan.moment in ("start", "ready", "end"):
        return happens
    return lambda: has_done(plan.after_steps) and happens()


def _victims(run: RunDir, role: str, supervisor: int) -> list[psutil.Process]:
    if role == "supervisor":
        return [psutil.Process(supervisor)]
    if role == "everything":
        return [psutil.Process(supervisor), *members(run)]
    return of_role(run, role)


def _strike(victims: list[psutil.Process], role: str, rng: random.Random) -> None:
    """SIGKILL them: all of "everything" in random order, one random process of a role otherwise."""
    chosen = rng.sample(victims, len(victims)) if role == "everything" else [rng.choice(victims)]
    for process in chosen:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def kill_once(
    run: RunDir,
    plan: Plan,
    number: int,
    seed: int,
    output: Path,
    settings: Sequence[str] = (f"steps={STEPS}",),
) -> Outcome | None:
    """One attempt and one kill; None when the run was done before the moment came."""
    rng = random.Random(f"{seed}-{number}")
    before, attempts = check_commits(run), len(run.attempts())
    arguments = ["run", "demo", *SMALL, *settings, "--run-dir", str(run.root)]
    if run.run_yaml.exists():
        arguments = ["run", "demo", "--run-dir", str(run.root), "--resume"]
    began, mark = time.monotonic(), output.stat().st_size if output.exists() else 0
    process = start(*arguments, output=output)

    def ended() -> bool:
        return process.poll() is not None

    def roles_are_up() -> bool:
        text = output.read_bytes()[mark:]
        started = re.search(rb"^starting (.+)$", text, re.MULTILINE)
        return started is not None and text.count(b"] ready after ") > started[1].count(b",")

    reached = _moment(run, plan, attempts)
    if plan.moment != "start":
        # No other moment is before this, and looking often takes time that the start needs.
        wait_until(lambda: roles_are_up() or ended(), 240, "all roles", 0.1)
    every = 0.001 if plan.moment in ("commit", "publication") else 0.01
    wait_until(lambda: reached() or ended(), 240, plan.moment, every)
    time.sleep(plan.delay_frac * _SPREAD_S[plan.moment])
    victims: list[psutil.Process] = []

    def found() -> bool:
        if process.poll() is None:
            victims[:] = _victims(run, plan.role, process.pid)
        return bool(victims) or process.poll() is not None

    wait_until(found, 60, plan.role)
    if process.poll() is not None:
        assert process.returncode == 0, output.read_text()[mark:]
        return None
    _strike(victims, plan.role, rng)
    struck = time.monotonic()
    # A server that is killed while the run goes on is replaced, and the run goes on to its end.
    process.wait(timeout=240)
    ended_s = time.monotonic() - struck
    check_nothing_runs(run)
    text = output.read_bytes()[mark:].decode(errors="replace")
    code = None if process.returncode == -signal.SIGKILL else process.returncode
    if code is not None and code != 0:
        assert code == 75, text
        assert _WORDS[plan.role] in text, text
        assert plan.role != "rank" or re.search(r"opd-rank-\d ended with SIGKILL", text), text
        assert "--resume" in text, text
    # A server may be killed after the last commit: nothing is lost, so nothing is said.
    assert code != 0 or plan.moment == "end" or check_commits(run) == STEPS, text
    after = check_commits(run)
    return Outcome(
        number, plan.role, plan.moment, plan.after_steps, round(struck - began, 2), code, round(ended_s, 2),
        before, after, "done" if code == 0 else "resumed",
    )  # fmt: skip


def finish(run: RunDir, output: Path) -> None:
    """Resume without a kill until the run is done, and check all of it."""
    process = start("run", "demo", "--run-dir", str(run.root), "--resume", output=output)
    assert process.wait(timeout=240) == 0, output.read_text()
    check_nothing_runs(run)
    check_finished(run, STEPS)


def kill_runs(
    folder: Path, seed: int, plans: list[Plan], report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Carry out all plans over as many runs as that takes; every run is brought to its end and checked."""
    outcomes: list[Outcome] = []
    number_of_run, run = 0, None
    settings: list[str] = []
    for number, plan in enumerate(plans):
        outcome = None
        while outcome is None:
            if run is None:
                run = RunDir(folder / f"run_{number_of_run}")
                # Every other run saves in the background.
                is_async = str(bool(number_of_run % 2)).lower()
                settings = [f"steps={STEPS}", f"checkpoint.async_save={is_async}"]
                number_of_run += 1
            outcome = kill_once(run, plan, number, seed, folder / "output.txt", settings)
            if outcome is None or outcome.code == 0:
                check_finished(run, STEPS)
                run = None
        outcomes.append(outcome)
        report(outcome)
    if run is not None and run.run_yaml.exists():
        finish(run, folder / "output.txt")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    table = arguments.folder / "kills.jsonl"

    def report(outcome: Outcome) -> None:
        line = json.dumps({"seed": arguments.seed, **asdict(outcome)})
        print(line, flush=True)
        with table.open("a") as file:
            file.write(line + "\n")

    plans = draw_plans(arguments.seed, arguments.kills)
    kill_runs(arguments.folder, arguments.seed, plans, report)


if __name__ == "__main__":
    main()
