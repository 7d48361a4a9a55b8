"""Process entry of a learner rank, under torchrun.

    torchrun ... -m opd_megatron.megatron.learner --run-yaml RUN/run.yaml --mailbox DIR

Rank 0 polls the mailbox and broadcasts each command over a gloo group; while there is none it
broadcasts a heartbeat, so no rank waits in a collective for longer than a heartbeat plus one
command. Every rank writes down what it begins, so that one that hangs is found (exchange/beats.py).
A rank that fails posts the failure as the answer (unless one is there) and ends; torchrun then ends
the others. Ranks die with their parent.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from opd_megatron.atomic import write_json
from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import OpdError
from opd_megatron.exchange import mailbox
from opd_megatron.exchange.beats import Mark, RankBeat, unwatched
from opd_megatron.lifeline import RANK_NAME, die_with_parent, end_at_parents_request, take_name

if TYPE_CHECKING:
    from opd_megatron.megatron.state import LearnerState

log = logging.getLogger("opd.learner")

# Set by megatron/torchrun.py; absent under any other torchrun.
AGENT_PID = "OPD_TORCHRUN_PID"

HEARTBEAT_S = 10.0
_EXIT_DEFECT = 1


@dataclass
class CommandLoop:
    """Gives every rank the same commands, one after the other.

    Args:
        folder: the mailbox.
        group: a gloo group of all ranks.
        mark: told that this rank waits.
    """

    folder: Path
    group: dist.ProcessGroup
    number: int = 1
    mark: Mark = unwatched

    def next(self) -> dict[str, Any]:
        """The next command, on every rank."""
        box: list[dict[str, Any] | None] = [None]
        start = time.monotonic()
        while box[0] is None:
            self.mark(f"waiting for command {self.number}")
            if dist.get_rank() == 0:
                box[0] = self._poll(start)
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _poll(self, start: float) -> dict[str, Any] | None:
        """Look for the command that is waited for since `start`, until it is time for a sign of life."""
        deadline = time.monotonic() + HEARTBEAT_S
        while (now := time.monotonic()) < deadline:
            command = mailbox.read_command(self.folder, self.number)
            if command is not None:
                return command
            time.sleep(mailbox.pause_s(now - start))
        return None

    def answer(self, result: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            mailbox.post_answer(self.folder, self.number, result)
        self.number += 1


def start_world(recipe: Recipe) -> LearnerState:
    """Versions, device, process groups and model of this rank.

    Raises:
        ConfigError: untested Megatron-Core, a foreign apex, a GPU that can not run the precision, unsupported student
            or layout.
    """
    from opd_megatron.megatron.version import check_apex, check_version

    check_version()
    check_apex()
    if recipe.device == "cpu":
        from opd_megatron.megatron import cpu_shim

        torch.set_num_threads(1)
        cpu_shim.install()
    else:
        from opd_megatron.megatron.precision import check_gpu, current_gpu

        check_gpu(recipe.learner, current_gpu())
    from opd_megatron.megatron import parallel
    from opd_megatron.megatron.layout import layout_of
    from opd_megatron.megatron.state import build_state

    timeout_s = recipe.learner.step_timeout_s
    parallel.start_process_group(recipe.device, timeout_s)
    layout = layout_of(recipe.learner)
    parallel.start_model_parallel(layout, recipe.seed, timeout_s)
    return build_state(recipe)


def _announce(state: LearnerState, folder: Path) -> None:
    """Write ready.json when every rank is here."""
    from opd_megatron.megatron.version import megatron_version

    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 0:
        ready = {
            "world_size": dist.get_world_size(),
            "layout": state.layout.as_mapping(),
            "pids": pids,
            "versions": {"torch": torch.__version__, "megatron_core": megatron_version()},
        }
        write_json(folder / mailbox.READY, ready, durable=False)


def serve(state: LearnerState, loop: CommandLoop) -> None:
    """Answer commands until `stop`."""
    from opd_megatron.megatron.commands import run_command

    while True:
        command = loop.next()
        start = time.perf_counter()
        if command["kind"] == "stop":
            loop.answer({})
            return
        state.mark(f"the start of {command['kind']}")
        result = run_command(state, command)
        loop.answer(result)
        log.info("%06d %s %.3f s", command["number"], command["kind"], time.perf_counter() - start)


def _post_failure(folder: Path, number: int, error: BaseException) -> int:
    """Post the failure unless another rank did, and return the exit code."""
    exit_code = error.exit_code if isinstance(error, OpdError) else _EXIT_DEFECT
    if mailbox.read_answer(folder, number) is None:
        mailbox.post_failure(folder, number, error, exit_code)
    return exit_code


def main(argv: list[str] | None = None) -> int:
    """Run this rank; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-yaml", type=Path, required=True)
    parser.add_argument("--mailbox", type=Path, required=True)
    arguments = parser.parse_args(argv)
    die_with_parent(int(os.environ.get(AGENT_PID) or os.getppid()))
    end_at_parents_request()
    # Where does a rank hang? Its launcher asks before it ends the rank, which it finds by the name (launch/stacks.py).
    faulthandler.register(signal.SIGUSR1)
    take_name(f"{RANK_NAME}-{os.environ.get('RANK', '')}")
    log.setLevel(logging.INFO)
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format=f"%(asctime)s rank {os.environ.get('RANK', '?')} %(message)s",
    )
    loop: CommandLoop | None = None
    try:
        recipe = read_run_yaml(arguments.run_yaml)
        state = start_world(recipe)
        timeout = datetime.timedelta(seconds=recipe.learner.step_timeout_s + 2 * HEARTBEAT_S)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        state.mark = RankBeat(arguments.mailbox, dist.get_rank()).mark
        loop = CommandLoop(arguments.mailbox, group, mark=state.mark)
        state.mark("the start")
        _announce(state, arguments.mailbox)
        serve(state, loop)
    except (
        Exception
    ) as error:  # the one place where a rank's failure becomes an answer and an exit code
        traceback.print_exc()
        return _post_failure(arguments.mailbox, loop.number if loop else 1, error)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    # Megatron warns on import that Transformer Engine and Apex are missing, six times per rank.
    warnings.filterwarnings("ignore", module="megatron")
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Destructors of process groups could wait for peers that are still in a collective.
        os._exit(code)
