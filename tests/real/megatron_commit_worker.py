"""Kills saves of a real learner state: at random moments, and at every call that changes the disk. Damages commits.

    python megatron_commit_worker.py WORK random|calls|torn_calls|damage|background_calls|... TRIALS

The process imports torch and Megatron once and forks a child per trial. A child joins a world of its own, loads the
newest commit and compares it with what its step must hold, says so, and saves the next commits until it is killed. So
every commit that a kill left behind is not only verified but loaded. With `background_` the saves are asynchronous and
the state changes while they are under way. WORK/<what>.json holds what happened.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_tiny import write_model
from storage_faults import Event, Faults, lose_power

from opd_megatron.config.schema import (
    CheckpointConfig,
    LearnerConfig,
    OptimizerConfig,
    Recipe,
    StudentConfig,
)
from opd_megatron.controller import commit
from opd_megatron.megatron import checkpoint, cpu_shim, parallel
from opd_megatron.megatron.layout import layout_of
from opd_megatron.megatron.state import LearnerState, build_state

KEEP = 2
CHILD_TIMEOUT_S = 60.0
FINGERPRINT = {"optimizer.lr": 1e-3}
SMALL: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 20,
}


def recipe_for(model: Path, background: bool) -> Recipe:
    return Recipe(
        device="cpu",
        student=StudentConfig(path=str(model)),
        optimizer=OptimizerConfig(lr=1e-3),
        learner=LearnerConfig(precision="fp32"),
        checkpoint=CheckpointConfig(async_save=background),
    )


def new_state(store: Path, recipe: Recipe, rank: int = 0) -> LearnerState:
    """A rank of a world that meets at a file."""
    ranks = recipe.learner.world_size
    file = torch.distributed.FileStore(str(store), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=file, rank=rank, world_size=ranks)
    parallel.start_model_parallel(layout_of(recipe.learner), recipe.seed, 60)
    return build_state(recipe)


@torch.no_grad()
def set_step(state: LearnerState, step: int) -> None:
    """Weights, moments and counters that only this step has."""
    for number, parameter in enumerate(state.modules[0].parameters()):
        parameter.fill_(step + number / 64)
    for part in state.require_loaded().chained_optimizers:
        for moments in part.optimizer.state.values():  # type: ignore[union-attr]
            moments["exp_avg"].fill_(step + 0.25)
            moments["exp_avg_sq"].fill_(step + 0.5)
            moments["step"].fill_(float(step))
    state.optimizer_step = step


def check_step(state: LearnerState, step: int) -> None:
    """Raise unless the state is exactly `set_step(step)`."""
    assert state.optimizer_step == step, (state.optimizer_step, step)
    for number, parameter in enumerate(state.modules[0].parameters()):
        assert bool((parameter == step + number / 64).all()), f"parameter {number}"
    for part in state.require_loaded().chained_optimizers:
        for moments in part.optimizer.state.values():  # type: ignore[union-attr]
            assert bool((moments["exp_avg"] == step + 0.25).all())
            assert bool((moments["exp_avg_sq"] == step + 0.5).all())
            assert float(moments["step"]) == step


def quiet(_: str) -> None:
    return None


def save_commit(state: LearnerState, root: Path, step: int) -> None:
    """What controller and learner do for one commit, in one process."""
    folder = commit.begin(root, step)
    save_model(state, folder / commit.MODEL, step)
    commit.finish(root, step, {"step": step}, FINGERPRINT, KEEP)


def save_model(state: LearnerState, directory: Path, step: int) -> None:
    """The learner's part of it."""
    set_step(state, step)
    if state.recipe.checkpoint.async_save:
        checkpoint.begin(state, directory)
        set_step(state, step + 1)  # training goes on
        while checkpoint.finish(state) is None:
            time.sleep(1e-3)
    else:
        checkpoint.save(state, directory)


def child(work: Path, recipe: Recipe, told: int, faults: tuple[int | None, bool] | None) -> None:
    """Load and compare the newest commit, say its step, then save until killed (or once, with faults)."""
    root = work / "checkpoints"
    state = new_state(work / f"store-{os.getpid()}", recipe)
    state.load_hf(Path(recipe.student.path))
    found = commit.newest(root, quiet)
    step = 0
    if found is not None:
        checkpoint.load(state, found.model)
        check_step(state, found.step)
        step = found.step
    os.write(told, (json.dumps(["ready", str(step)]) + "\n").encode())
    if faults is not None:
        Faults(root, told, *faults).install()
        save_commit(state, root, step + 1)
        os.write(told, (json.dumps(["saved", str(step + 1)]) + "\n").encode())
        return
    while True:
        step += 1
        save_commit(state, root, step)


def forked(work: Path, recipe: Recipe, faults: tuple[int | None, bool] | None) -> tuple[int, int]:
    """Pid of a child and the read end of its pipe."""
    read, told = os.pipe()
    pid = os.fork()
    if pid:
        os.close(told)
        return pid, read
    code = 1
    try:
        os.close(read)
        child(work, recipe, told, faults)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def read_events(pipe: int, until: str | None = None) -> list[Event]:
    """Lines of a child: up to the first `until`, or up to its end."""
    text = b""
    deadline = time.monotonic() + CHILD_TIMEOUT_S
    while until is None or f'["{until}"'.encode() not in text:
        readable, _, _ = select.select([pipe], [], [], deadline - time.monotonic())
        assert readable, "a child neither answers nor ends"
        block = os.read(pipe, 1 << 16)
        if not block:
            break
        text += block
    return [json.loads(line) for line in text.decode().splitlines() if line.endswith("]")]


def loadable(root: Path) -> int:
    """Step of the newest commit that verifies, 0 when there never was one."""
    found = commit.newest(root, quiet)
    return 0 if found is None else found.step


def random_kills(work: Path, recipe: Recipe, trials: int) -> dict[str, Any]:
    """Kill a child that saves one commit after the other, at a random moment of it.

    About every fourth kill comes after a commit, however busy the machine gets meanwhile: the time in which kills are
    drawn follows what they meet.
    """
    rng = random.Random(0)
    root, moments = work / "checkpoints", []
    first = _seconds_per_save(work, recipe)
    before, window = loadable(root), 1.2 * first
    for trial in range(trials):
        # By turns beside the training and not.
        checkpoints = CheckpointConfig(async_save=bool(trial % 2))
        turn = dataclasses.replace(recipe, checkpoint=checkpoints)
        pid, pipe = forked(work, turn, None)
        ready = read_events(pipe, "ready")
        assert ready and int(ready[0][1]) == before, "the commit that was left does not load"
        time.sleep(rng.uniform(0, window))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pipe)
        torn = [p.name for p in root.iterdir() if p.name.startswith(".")]
        after = loadable(root)
        assert after >= before, f"commit {before} was lost"
        moments.append((after - before, len(torn)))
        window *= 0.94 if after > before else 1.02
        before = after
    return {
        "kills": len(moments),
        "seconds_per_save": first,
        "in_the_middle_of_a_save": sum(1 for _, torn in moments if torn),
        "after_a_commit": sum(1 for steps, _ in moments if steps),
        "commits_at_the_end": commit.committed_steps(root),
    }


def _seconds_per_save(work: Path, recipe: Recipe) -> float:
    """Let a child make two commits."""
    pid, pipe = forked(work, recipe, None)
    read_events(pipe, "ready")
    began = time.monotonic()
    while loadable(work / "checkpoints") < 2:
        assert time.monotonic() - began < CHILD_TIMEOUT_S
        time.sleep(0.01)
    took = (time.monotonic() - began) / 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(pipe)
    return took


def every_call(work: Path, recipe: Recipe, torn: bool) -> dict[str, Any]:
    """Kill at the first call that changes the disk, at the second, ... until a save gets through.

    The save is of the fourth commit, so old ones are removed at its end. After each kill: does the process's view hold
    a loadable commit, and does what a power loss would leave?
    """
    root, spare = work / "checkpoints", work / "spare"
    for step in range(1, 4):
        pid, pipe = forked(work, recipe, (None, False))
        assert read_events(pipe)[-1] == ["saved", str(step)]
        os.waitpid(pid, 0)
        os.close(pipe)
    shutil.copytree(root, spare)
    kinds: list[str] = []
    seen = {"kill": [0, 0], "power loss": [0, 0]}  # the old commit is the newest, the new one is
    while True:
        pid, pipe = forked(work, recipe, (len(kinds), torn))
        events = read_events(pipe)
        os.waitpid(pid, 0)
        os.close(pipe)
        assert events[0] == ["ready", "3"], events[:1]
        if events[-1][0] == "saved":
            calls = [event[0] for event in events[1:-1]]
            lose_power(events[1:-1])
            break
        kinds.append(str(len(events)))
        for what in seen:
            if what == "power loss":
                lose_power(events[1:])
            step = loadable(root)
            assert step in (3, 4), (what, len(kinds), step)
            assert len(commit.committed_steps(root)) >= KEEP, (what, len(kinds))
            seen[what][step - 3] += 1
        shutil.rmtree(root)
        shutil.copytree(spare, root)
    assert len(calls) == len(kinds)
    counts = {kind: calls.count(kind) for kind in sorted(set(calls))}
    return {"calls": counts, "kills": len(kinds), "old_or_new": seen, "newest": loadable(root)}


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def damaged(work: Path, recipe: Recipe) -> dict[str, Any]:
    """Flip a bit of, cut and remove every file of the newest commit; each time, what does a new child load?"""
    rng = random.Random(0)
    root, spare = work / "checkpoints", work / "spare"
    for _ in range(2):
        pid, pipe = forked(work, recipe, (None, False))
        read_events(pipe)
        os.waitpid(pid, 0)
        os.close(pipe)
    shutil.copytree(root, spare)
    names = sorted(
        p.relative_to(root).as_posix() for p in root.glob("step_000002/**/*") if p.is_file()
    )
    loaded: dict[str, int] = {}
    for name in names:
        for kind in ("flip", "cut", "remove"):
            damage(root / name, kind, rng)
            pid, pipe = forked(work, recipe, (0, False))
            loaded[f"{kind} {name}"] = int(read_events(pipe, "ready")[0][1])
            os.waitpid(pid, 0)
            os.close(pipe)
            shutil.rmtree(root)
            shutil.copytree(spare, root)
    return {"loaded": loaded}


def main() -> None:
    work, what, trials = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    cpu_shim.install()
    gc.freeze()  # a child need not search what was imported
    work.mkdir(parents=True, exist_ok=True)
    moment = what.removeprefix("background_")
    recipe = recipe_for(write_model(work / "student", **SMALL), background=moment != what)
    if moment == "random":
        result = random_kills(work, recipe, trials)
    elif moment == "damage":
        result = damaged(work, recipe)
    else:
        result = every_call(work, recipe, torn=moment == "torn_calls")
    (work / f"{what}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
