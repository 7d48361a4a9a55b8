"""From a recipe to the command lines of one machine's processes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.atomic import write_json
from opd_megatron.config.schema import Recipe, ServerConfig
from opd_megatron.launch.ports import PortReservations
from opd_megatron.launch.role_command import RoleCommand
from opd_megatron.rundir import RunDir
from opd_megatron.serving.command import LOOPBACK, server_command

LEARNER_GRACE_S = 2.0


@dataclass(frozen=True)
class Server:
    """One SGLang server of a role."""

    role: str
    url: str
    model_path: str
    config: ServerConfig
    port: int
    address: str = LOOPBACK


def servers_by_role(recipe: Recipe) -> dict[str, tuple[str, ServerConfig]]:
    """Model and settings by role: "rollout", and "teacher-<name>" for each served teacher."""
    return {"rollout": (recipe.student.path, recipe.rollout.server)} | {
        f"teacher-{name}": (teacher.path, teacher.server)
        for name, teacher in recipe.served_teachers.items()
    }


def place_servers(recipe: Recipe, ports: PortReservations) -> dict[str, list[Server]]:
    """All servers of a recipe on this machine, by role; none where the run asks none."""
    placed: dict[str, list[Server]] = {}
    for role, (model_path, config) in servers_by_role(recipe).items():
        placed[role] = []
        for number in range(config.num_servers if recipe.uses_servers else 0):
            port = ports.reserve()
            url = f"http://127.0.0.1:{port}"
            placed[role].append(Server(f"{role}-{number}", url, model_path, config, port))
    return placed


def server_role(
    server: Server, recipe: Recipe, run: RunDir, attempt: int, seed_offset: int
) -> RoleCommand:
    command = server_command(
        server.config,
        device=recipe.device,
        model_path=Path(server.model_path),
        port=server.port,
        keys_file=run.attempt(attempt).keys,
        # A resumed attempt must not draw the samples of the one before again.
        seed=recipe.seed * 1009 + attempt * 31 + seed_offset,
        host=server.address,
        parent_pid=os.getpid(),
    )
    log = run.role_logs(attempt, server.role) / "server.log"
    return RoleCommand(
        server.role, command.argv, log, command.env, max_restarts=server.config.max_restarts
    )


def learner_role(
    recipe: Recipe, run_yaml: Path, mailbox: Path, log: Path, ranks: int | None = None
) -> RoleCommand:
    """The torchrun of one node; ranks on CPU are forked, use one thread and gloo on the loopback interface.

    Args:
        ranks: how many of the world's ranks this node has; None: all.
    """
    argv = [
        *(sys.executable, "-m", "opd_megatron.megatron.torchrun"),
        *(["--opd-fork"] if recipe.device == "cpu" else []),
        *("--nproc-per-node", str(ranks or recipe.learner.world_size)),
        *("-m", "opd_megatron.megatron.learner"),
        *("--run-yaml", str(run_yaml), "--mailbox", str(mailbox)),
    ]
    environment = {"PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if recipe.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    return RoleCommand("learner", argv, log, environment, grace_s=LEARNER_GRACE_S)


def controller_role(run: RunDir, attempt: int, module: str) -> RoleCommand:
    """The process whose end ends the run; `module` is its main."""
    argv = [
        *(sys.executable, "-m", module),
        *("--run-dir", str(run.root), "--attempt", str(attempt)),
    ]
    log = run.role_logs(attempt, "controller") / "controller.log"
    environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return RoleCommand("controller", argv, log, environment, to_console=True, grace_s=2.0)


def write_endpoints(path: Path, placed: dict[str, list[Server]]) -> None:
    """Where the controller finds the servers. Holds no key."""
    write_json(
        path,
        {
            role: [{"name": s.role, "url": s.url} for s in servers]
            for role, servers in placed.items()
        },
        durable=False,
    )
