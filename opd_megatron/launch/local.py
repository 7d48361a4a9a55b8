"""`opd run`: all roles of a run on this machine, from a resolved recipe to an exit code."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opd_megatron.atomic import write_json
from opd_megatron.config.rules import check
from opd_megatron.config.run_yaml import read_run_mapping, write_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_RETRY,
    ConfigError,
    RoleDied,
)
from opd_megatron.launch import leftovers, lock
from opd_megatron.launch.members import kill_attempt, scratch
from opd_megatron.launch.ports import PortReservations
from opd_megatron.launch.preflight import check_inputs, check_learner, check_machine
from opd_megatron.launch.role_command import describe_exit, tail
from opd_megatron.launch.roles import (
    controller_role,
    learner_role,
    place_servers,
    server_role,
    write_endpoints,
)
from opd_megatron.launch.slurm.queue import refuse_living_job
from opd_megatron.launch.stacks import dump_stacks
from opd_megatron.launch.supervisor import Interrupted, MainSigns, Supervisor
from opd_megatron.observe.environment import describe_environment
from opd_megatron.rundir import RunDir, make_folder
from opd_megatron.serving.keys import new_keys, write_keys

Say = Callable[[str], None]


def prepare_run_dir(
    run: RunDir, recipe: Recipe, recipe_file: Path, overrides: Sequence[str], resume: bool
) -> None:
    """Write what the run is into its directory.

    Raises:
        ConfigError: it holds a run and --resume was not given.
    """
    if not resume and run.run_yaml.exists():
        raise ConfigError.of(
            "--run-dir",
            str(run.root),
            "holds a run already",
            "go on with it by `opd run ... --resume`, or choose another directory",
        )
    write_run_yaml(run.run_yaml, recipe, recipe_file, overrides)
    write_json(run.environment, describe_environment())


def run_local(
    recipe: Recipe,
    recipe_file: Path,
    overrides: Sequence[str],
    run: RunDir,
    resume: bool,
    say: Say,
) -> int:
    """Run a recipe here.

    Returns:
        the exit code of the controller; 130 after Ctrl-C, 75 after SIGTERM or SIGHUP.

    Raises:
        ConfigError: bad recipe, inputs or run directory; nothing was started.
        RoleDied: a process died; the message names it.
    """
    check(recipe)
    check_learner(recipe)
    hint = f"go on with: opd run {recipe.name} --run-dir {run.root} --resume"
    with _claimed(recipe, recipe_file, overrides, run, resume, say) as attempt:
        try:
            code = _supervise(recipe, run, attempt, "opd_megatron.controller.main", True, say)
        except Interrupted as interruption:
            say(f"{interruption}: everything stopped; {hint}")
            return _code_of(interruption)
        except RoleDied as error:
            raise RoleDied(f"{error}\n{hint}") from error
        if code == EXIT_RETRY:
            say(hint)
        return code


def evaluate_local(
    recipe: Recipe, recipe_file: Path, overrides: Sequence[str], run: RunDir, say: Say
) -> int:
    """Evaluate the recipe's student here: servers only, no learner. Returns and raises as `run_local`."""
    if not recipe.data.heldout:
        raise ConfigError.of(
            "data.heldout", "", "evaluation needs held-out prompts", "set data.heldout=FILE"
        )
    module = "opd_megatron.controller.evaluate_main"
    return _once(recipe, recipe_file, overrides, run, module, False, say)


def probe_local(
    recipe: Recipe, recipe_file: Path, overrides: Sequence[str], run: RunDir, say: Say
) -> int:
    """Compare the recipe's teachers here: servers, and the learner for teachers inside it. Returns and raises as
    `run_local`.
    """
    if not recipe.teachers:
        raise ConfigError.of(
            "teachers", {}, "there is none to compare", "set teachers.main.path=DIR"
        )
    if recipe.in_process_teachers:
        check_learner(recipe)
    module = "opd_megatron.controller.probe_main"
    with_learner = bool(recipe.in_process_teachers)
    return _once(recipe, recipe_file, overrides, run, module, with_learner, say)


def _once(
    recipe: Recipe,
    recipe_file: Path,
    overrides: Sequence[str],
    run: RunDir,
    module: str,
    with_learner: bool,
    say: Say,
) -> int:
    """Something that is measured and never resumed."""
    with _claimed(recipe, recipe_file, overrides, run, False, say) as attempt:
        try:
            return _supervise(recipe, run, attempt, module, with_learner, say)
        except Interrupted as interruption:
            say(f"{interruption}: everything stopped")
            return _code_of(interruption)


def _code_of(interruption: Interrupted) -> int:
    """130 for a person's Ctrl-C; a scheduler's SIGTERM, as at preemption, asks for another try."""
    return EXIT_INTERRUPTED if interruption.signal is signal.SIGINT else EXIT_RETRY


@contextmanager
def _claimed(
    recipe: Recipe,
    recipe_file: Path,
    overrides: Sequence[str],
    run: RunDir,
    resume: bool,
    say: Say,
) -> Generator[int]:
    """Check everything, take the run directory, end what a killed attempt left, and number a new attempt."""
    check(recipe)
    check_inputs(recipe)
    check_machine(recipe)
    if resume:
        read_run_mapping(run.run_yaml)
        refuse_living_job(run)
    make_folder(run.root, "--run-dir")
    with lock.hold(run.lock):
        prepare_run_dir(run, recipe, recipe_file, overrides, resume)
        for number in run.attempts():
            identity = run.attempt(number).identity
            killed = kill_attempt(identity.read_text()) if identity.exists() else []
            if killed:
                say(f"ended {len(killed)} processes that attempt {number} had left behind")
            leftovers.remove(run, number)
        leftovers.remove_temporaries(run)
        yield _new_attempt(run)


def _new_attempt(run: RunDir) -> int:
    number = (run.attempts() or [0])[-1] + 1
    attempt = run.attempt(number)
    for folder in (attempt.root, attempt.mailbox, attempt.batches):
        folder.mkdir(parents=True, mode=0o700)
    attempt.identity.write_text(uuid.uuid4().hex)
    write_keys(attempt.keys, new_keys())
    logs = run.logs / f"attempt_{number}"
    logs.mkdir(parents=True, exist_ok=True)
    temporary = run.logs / f".latest.{os.getpid()}"
    temporary.symlink_to(logs.name)
    temporary.replace(run.logs / "latest")
    return number


def _supervise(
    recipe: Recipe, run: RunDir, attempt: int, controller: str, with_learner: bool, say: Say
) -> int:
    files = run.attempt(attempt)
    identity = files.identity.read_text()
    signs = MainSigns(
        files.finishing, files.serving, files.heartbeat, recipe.controller.hang_timeout_s
    )
    with (
        scratch(identity) as environment,
        PortReservations() as ports,
        Supervisor(identity, environment, say) as supervisor,
    ):
        placed = place_servers(recipe, ports)
        write_endpoints(files.endpoints, placed)
        servers = [server for group in placed.values() for server in group]
        names = [server.role for server in servers]
        if with_learner:
            names.append(f"learner ({recipe.learner.world_size} ranks)")
            # The learner first: its world is the slowest to come up.
            log = run.role_logs(attempt, "learner") / "learner.log"
            supervisor.start(learner_role(recipe, run.run_yaml, files.mailbox, log))
        say(f"starting {', '.join(names)}")
        for number, server in enumerate(servers):
            supervisor.start(server_role(server, recipe, run, attempt, number))
        supervisor.start(controller_role(run, attempt, controller))
        code = supervisor.watch("controller", signs)
        if with_learner and code == EXIT_RETRY:
            dump_stacks(identity, say)
        if code not in (EXIT_DONE, EXIT_RETRY, EXIT_CONFIG):
            log = supervisor.log_of("controller")
            raise RoleDied(
                f"controller ended with {describe_exit(code)}; the end of its log ({log}):\n{tail(log)}"
            )
        return code
