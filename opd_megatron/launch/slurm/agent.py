"""One role on one node: starts its processes, watches them, ends them with the attempt.

    srun ... python -m opd_megatron.launch.slurm.agent --run-dir DIR --attempt N --role ROLE

Slurm starts one agent a node; `SLURM_PROCID` says which of the role's nodes this is. What it runs and where comes from
the run directory. How an agent ends:

    a process of its role ends          that code of the role: 75, or 78 when the process said so; its log is shown
    ... a server, once all roles are up no end: it is started again in its place, `max_restarts` times
    attempts/N/ended is there           0, after everything it started is gone; the controller's agent 75
    the controller ends                 its code, written to attempts/N/ended (the controller's agent only)
    SIGTERM, SIGINT, SIGUSR1            not at all: the request to stop is put down for the controller, which commits
                                        and ends; the others are needed until then, so Slurm's SIGTERM, which goes to
                                        every process of a step, is kept from them
    ... after `opd cancel`              at once, and everything it started

After an attempt that failed, the learner's agent has its ranks write their stacks into the log before it ends them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from opd_megatron.atomic import write_bytes
from opd_megatron.errors import EXIT_DONE, EXIT_RETRY, ConfigError, OpdError, RoleDied
from opd_megatron.launch.gpus import visible_gpus
from opd_megatron.launch.members import remove_scratch, scratch
from opd_megatron.launch.ports import PortReservations
from opd_megatron.launch.preflight import check_machine
from opd_megatron.launch.slurm import commands, nodes, secrets
from opd_megatron.launch.slurm.place import Place, open_place
from opd_megatron.launch.slurm.table import CONTROLLER, LEARNER
from opd_megatron.launch.stacks import dump_stacks
from opd_megatron.launch.supervisor import Interrupted, MainSigns, Supervisor
from opd_megatron.rundir import AttemptDir, RunDir

_CHECK_TIMEOUT_S = 120
# Of bash: not executable, not found.
_NOT_RUN = (126, 127)


def say(text: str) -> None:
    """At once: the output is a file, and the agent lives as long as the attempt."""
    print(f"opd: {text}", flush=True)


def _failed_check(command: str) -> str:
    """Why the site's check of this node failed; empty when it passed.

    Raises:
        ConfigError: it is no command, which says nothing of the node.
    """
    try:
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=_CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"cluster.node_check did not end in {_CHECK_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    if done.returncode in _NOT_RUN:
        raise ConfigError.of(
            "cluster.node_check",
            command,
            f"can not be run: {done.stderr.strip()[-500:]}",
            "mend it",
        )
    return f"cluster.node_check ended with {done.returncode}: {done.stderr.strip()[-500:]}"


def _missing_gpus(place: Place) -> str:
    """What is wrong with this node's GPUs; empty when as many answer as the role needs."""
    wanted = place.role.first_device + place.role.devices
    if place.recipe.device != "cuda" or place.role.devices == 0:
        return ""
    try:
        found = len(visible_gpus())
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    return "" if found >= wanted else f"nvidia-smi lists {found} GPUs, the role needs {wanted}"


def _check_numactl(place: Place) -> None:
    """
    Raises:
        ConfigError: processes are to be bound and the program for it is not here.
    """
    wanted = place.frozen.devices_per_numa_node
    if place.recipe.device == "cuda" and wanted and shutil.which("numactl") is None:
        raise ConfigError.of(
            "cluster.devices_per_numa_node",
            wanted,
            "needs numactl, which is not here",
            "install it, or set it to 0",
        )


def check_node(place: Place) -> None:
    """Run the site's check of a node and count its GPUs; leave the node out from now on when one fails.

    Raises:
        RoleDied: the node is bad.
        ConfigError: the check is no command, torch here has no CUDA, or numactl is missing: no other node would mend
            that.
    """
    reason = _failed_check(place.frozen.node_check) if place.frozen.node_check else ""
    reason = reason or _missing_gpus(place)
    if reason:
        with place.run.slurm.bad_nodes.open("a") as file:
            file.write(f"{nodes.node_name()}\n")
        raise RoleDied(f"node {nodes.node_name()} is left out from now on: {reason}")
    if place.role.devices:
        check_machine(place.recipe)
        _check_numactl(place)


def remove_what_was_left(place: Place) -> None:
    """Temporary folders on this node of agents of earlier attempts, which were killed with all they had."""
    here = nodes.node_name()
    for number in place.run.attempts():
        for path in place.run.attempt(number).nodes.glob("*.json"):
            said = nodes.read_node(path)
            if number < place.attempt.number and said is not None and said.host == here:
                remove_scratch(said.agent)


def run_role(place: Place) -> int:
    """Start the role's processes here and stay with them until they or the attempt end; returns the exit code.

    Raises:
        OpdError: one of them died.
    """
    check_node(place)
    remove_what_was_left(place)
    identity = uuid.uuid4().hex
    added = secrets.read(place.frozen.secrets)
    with (
        scratch(identity) as environment,
        PortReservations(place.address) as ports,
        Supervisor(identity, {**environment, **added}, say, lambda _: notice(place), True) as roles,
    ):
        if place.role.name == CONTROLLER:
            said = nodes.NodeFile(identity, nodes.node_name(), place.address, ())
            nodes.write_node(place.attempt.nodes, CONTROLLER, 0, said)
            return _run_controller(place, roles)
        if place.role.name == LEARNER:
            roles.start(commands.learner(place, identity, ports))
        else:
            for role in commands.servers(place, identity, ports):
                roles.start(role)
        roles.attend(lambda: is_over(place.attempt), signs_of(place))
        if place.role.name == LEARNER and not place.attempt.finishing.exists():
            dump_stacks(identity, say)
        return EXIT_DONE


def _run_controller(place: Place, roles: Supervisor) -> int:
    attempt = place.attempt
    commands.write_all_endpoints(place)
    roles.start(commands.controller(place))
    code = roles.watch(CONTROLLER, signs_of(place), attempt.ended.exists)
    if code == EXIT_DONE:
        write_bytes(place.run.done, f"attempt {attempt.number}\n".encode())
    return code


def signs_of(place: Place) -> MainSigns:
    """The controller's signs, which every node sees."""
    files, limit = place.attempt, place.recipe.controller.hang_timeout_s
    return MainSigns(files.finishing, files.serving, files.heartbeat, limit)


def is_over(attempt: AttemptDir) -> bool:
    """All work is committed, or the attempt has failed: either way nobody needs the roles any more."""
    return attempt.finishing.exists() or attempt.ended.exists()


def notice(place: Place) -> bool:
    """Somebody wants the machines: ask the controller to commit and end. True: the run was cancelled, end at once."""
    place.attempt.stop_requested.touch()
    if not place.run.slurm.cancelled.exists():
        return False
    end_attempt(place.attempt, EXIT_RETRY)
    return True


def end_attempt(attempt: AttemptDir, code: int) -> None:
    """Let every other node of the attempt end."""
    write_bytes(attempt.ended, f"{code}\n".encode(), durable=False)


def node_index(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_PROCID", "0"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="opd_megatron.launch.slurm.agent")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--role", required=True)
    arguments = parser.parse_args(argv)
    run = RunDir(arguments.run_dir)

    def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
        run.attempt(arguments.attempt).stop_requested.touch()

    # From the first moment: a request to stop must not kill an agent that is still importing.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, ask_to_stop)
    code = EXIT_RETRY
    try:
        place = open_place(run, arguments.attempt, arguments.role, node_index(os.environ))
        code = run_role(place)
    except Interrupted:
        say(f"{arguments.role} on {nodes.node_name()}: cancelled")
    except OpdError as error:
        say(f"{arguments.role} on {nodes.node_name()}: {error}")
        code = error.exit_code
    finally:
        attempt = run.attempt(arguments.attempt)
        # Who ended it before knows why.
        if arguments.role == CONTROLLER and not attempt.ended.exists():
            end_attempt(attempt, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
