"""Two ranks that die separately while they save, and damaged commits that both turn away from.

    python megatron_ranks_worker.py WORK separate|damage

The process plays the controller: it makes the folder, forks both ranks into a world of their own, and makes the commit
only when both ended well. Ranks load the newest commit, compare it with what its step must hold, and save the next.
One of them is killed at one of its own calls that change the disk. WORK/<what>.json holds what happened.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from megatron_commit_worker import (
    FINGERPRINT,
    KEEP,
    SMALL,
    check_step,
    damage,
    new_state,
    quiet,
    save_model,
)
from megatron_tiny import write_model
from storage_faults import Faults

from opd_megatron.config.schema import CheckpointConfig, LearnerConfig, Recipe, StudentConfig
from opd_megatron.controller import commit
from opd_megatron.megatron import checkpoint, cpu_shim

RANKS = 2
# Every fifth call that changes the disk; one rank alone makes them all in megatron_commit_worker.py.
STRIDE = 5
FAILED = 99


def rank_main(work: Path, recipe: Recipe, rank: int, save: bool, die_at: int | None) -> int:
    """Load, compare, save; the step that was loaded."""
    root = work / "checkpoints"
    state = new_state(work / f"store-{os.getppid()}", recipe, rank)
    state.load_hf(Path(recipe.student.path))
    found = commit.newest(root, quiet)
    if found is not None:
        checkpoint.load(state, found.model)
        check_step(state, found.step)
    step = found.step if found is not None else 0
    if save:
        if die_at is not None:
            Faults(root, os.open(os.devnull, os.O_WRONLY), die_at, torn=True).install()
        save_model(state, root / f".step_{step + 1:06d}.tmp" / commit.MODEL, step + 1)
    return step


def world(
    work: Path, recipe: Recipe, save: bool = False, victim: int = 0, die_at: int | None = None
) -> list[int]:
    """How both ranks ended: minus the signal, or the step that they loaded."""
    (work / f"store-{os.getpid()}").unlink(missing_ok=True)
    pids: list[int] = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = FAILED
            try:
                code = rank_main(work, recipe, rank, save, die_at if rank == victim else None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def newest_step(root: Path) -> int:
    found = commit.newest(root, quiet)
    return 0 if found is None else found.step


def make_commit(work: Path, recipe: Recipe, step: int, **kill: Any) -> list[int]:
    """What the controller does: commit only what both ranks made durable."""
    root = work / "checkpoints"
    commit.begin(root, step)
    ended = world(work, recipe, save=True, **kill)
    if ended == [step - 1] * RANKS:
        commit.finish(root, step, {"step": step}, FINGERPRINT, KEEP)
    return ended


def separate(work: Path, recipe: Recipe) -> dict[str, Any]:
    """Kill one rank at every few calls of it, the saves by turns beside the training and not."""
    root = work / "checkpoints"
    make_commit(work, recipe, 1)
    kills: dict[str, int] = {}
    slowest = 0.0
    for victim in range(RANKS):
        for number in range(1000):
            background = CheckpointConfig(async_save=bool(number % 2))
            turn = dataclasses.replace(recipe, checkpoint=background)
            began = time.monotonic()
            ended = make_commit(work, turn, 2, victim=victim, die_at=STRIDE * number)
            slowest = max(slowest, time.monotonic() - began)
            if ended == [1] * RANKS:
                break
            assert ended[victim] == -signal.SIGKILL and ended[1 - victim] == FAILED, ended
            assert newest_step(root) == 1, "half a save was committed"
            kills[str(victim)] = number + 1
        # Every call of this rank was passed, so this save went through.
        assert newest_step(root) == 2
        assert world(work, recipe) == [2] * RANKS
        shutil.rmtree(root / "step_000002")
    return {"kills": kills, "slowest_s": slowest}


def damaged(work: Path, recipe: Recipe) -> dict[str, Any]:
    """Flip a bit of, cut or remove one file after the other of the newest commit; what does the world load?"""
    rng = random.Random(0)
    root, spare = work / "checkpoints", work / "spare"
    for step in (1, 2):
        assert make_commit(work, recipe, step) == [step - 1] * RANKS
    shutil.copytree(root, spare)
    names = sorted(p.name for p in (root / "step_000002" / commit.MODEL).iterdir())
    loaded: dict[str, Any] = {}
    for number, name in enumerate(names):
        kind = ("flip", "cut", "remove")[number % 3]
        damage(root / "step_000002" / commit.MODEL / name, kind, rng)
        loaded[f"{kind} {name}"] = world(work, recipe)
        shutil.rmtree(root)
        shutil.copytree(spare, root)
    return {"loaded": loaded}


def main() -> None:
    work, what = Path(sys.argv[1]), sys.argv[2]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    cpu_shim.install()
    work.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = SMALL | {"num_key_value_heads": 2}
    recipe = Recipe(
        device="cpu",
        student=StudentConfig(path=str(write_model(work / "student", **sizes))),
        learner=LearnerConfig(precision="fp32", tensor_parallel=RANKS),
    )
    result = separate(work, recipe) if what == "separate" else damaged(work, recipe)
    (work / f"{what}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
