"""What an agent starts on its node: devices, NUMA nodes, addresses, the learner's place in its world; bad nodes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.config.run_yaml import write_run_yaml
from opd_megatron.config.schema import LearnerConfig, ServerConfig
from opd_megatron.errors import ConfigError, RoleDied
from opd_megatron.launch.ports import PortReservations
from opd_megatron.launch.slurm import agent, commands, nodes
from opd_megatron.launch.slurm.place import open_place
from opd_megatron.launch.slurm.site import load_site
from opd_megatron.launch.slurm.table import role_table, write_table
from opd_megatron.rundir import RunDir
from opd_megatron.serving.keys import new_keys, write_keys


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 8 learner ranks, 3 rollout servers of 2 GPUs and one teacher, as `begin` leaves it."""
    recipe, path = resolve_recipe("demo", ["device=cuda"])
    server = ServerConfig(num_servers=3, tensor_parallel=2, context_length=64)
    recipe = dataclasses.replace(
        recipe,
        learner=LearnerConfig(data_parallel=8),
        rollout=dataclasses.replace(recipe.rollout, server=server),
    )
    made = RunDir(tmp_path)
    made.slurm.root.mkdir()
    site = load_site("gb200-nvl72", ["cluster.interface=lo"])
    write_table(made.slurm.table, role_table(recipe, site), site)
    write_run_yaml(made.run_yaml, recipe, path, [])
    attempt = made.attempt(1)
    attempt.nodes.mkdir(parents=True)
    attempt.identity.write_text("id")
    write_keys(attempt.keys, new_keys())
    return made


def test_servers_of_a_node_share_its_gpus_and_stay_near_them(run: RunDir) -> None:
    place = open_place(run, 1, "rollout", 0)
    with PortReservations(place.address) as ports:
        first, second = commands.servers(place, "agent", ports)
    assert [c.environment["CUDA_VISIBLE_DEVICES"] for c in (first, second)] == ["0,1", "2,3"]
    assert list(first.argv[:3]) == ["numactl", "--cpunodebind=0", "--membind=0"]
    assert list(second.argv[:3]) == ["numactl", "--cpunodebind=1", "--membind=1"]
    assert first.argv[first.argv.index("--host") + 1] == "127.0.0.1"
    # The last one has the second node for itself, up to the teacher.
    (third,) = commands.servers(open_place(run, 1, "rollout", 1), "agent", PortReservations())
    assert third.environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert third.name == "rollout-2"


def test_gpus_are_those_that_slurm_gave(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    place = open_place(run, 1, "rollout", 0)
    assert commands.visible_devices(place, 1, 2) == "6,7"


def test_a_role_that_starts_again_comes_back_to_its_ports(run: RunDir) -> None:
    place = open_place(run, 1, "rollout", 0)
    path = nodes.path_of(place.attempt.nodes, "rollout", 0)
    with PortReservations(place.address) as ports:
        commands.servers(place, "first", ports)
    before = nodes.read_node(path)
    with PortReservations(place.address) as ports:
        commands.servers(place, "second", ports)
    after = nodes.read_node(path)
    assert before and after
    assert (before.ports, before.servers) == (after.ports, after.servers)
    assert (before.agent, after.agent) == ("first", "second")


def test_the_learners_nodes_meet_at_the_first(run: RunDir) -> None:
    argv: list[list[str]] = []
    for index in (0, 1):
        place = open_place(run, 1, "learner", index)
        with PortReservations(place.address) as ports:
            command = commands.learner(place, "agent", ports)
        argv.append(list(command.argv))
        assert command.environment["GLOO_SOCKET_IFNAME"] == "lo"
        assert command.environment["NCCL_SOCKET_IFNAME"] == "lo"
        assert command.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    worlds = [line[line.index("--opd-nodes") + 1].split(",") for line in argv]
    assert [world[:3] for world in worlds] == [["2", "0", "127.0.0.1"], ["2", "1", "127.0.0.1"]]
    assert worlds[0][3] == worlds[1][3]
    for line in argv:
        assert line[line.index("--nproc-per-node") + 1] == "4"
        assert line[line.index("--numa-binding") + 1] == "node"
        assert line.index("--numa-binding") < line.index("opd_megatron.megatron.learner")


def test_nccl_talks_over_the_interface_of_the_site_everywhere(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights go from the learner to servers on other nodes."""
    place = open_place(run, 1, "rollout", 0)
    assert commands.nccl_environment(place) == {"NCCL_SOCKET_IFNAME": "lo"}
    with PortReservations(place.address) as ports:
        assert commands.servers(place, "a", ports)[0].environment["NCCL_SOCKET_IFNAME"] == "lo"
    # The site's own word for it is in the environment already.
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0,ib1")
    assert commands.nccl_environment(place) == {}


def test_a_node_without_numactl_is_no_bad_node(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_missing_gpus", lambda _: "")
    monkeypatch.setattr(agent, "check_machine", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"devices_per_numa_node=2: needs numactl"):
        agent.check_node(open_place(run, 1, "learner", 0))
    assert not run.slurm.bad_nodes.exists()


@pytest.mark.parametrize("listing", ["", "NVIDIA GB200, 10.0\nNVIDIA GB200, 10.0"])
def test_a_node_with_too_few_gpus_is_left_out(
    run: RunDir, listing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{listing}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", "gb07")
    with pytest.raises(RoleDied, match="node gb07 is left out from now on"):
        agent.check_node(open_place(run, 1, "learner", 0))
    assert run.slurm.bad_nodes.read_text() == "gb07\n"


def test_a_node_check_that_hangs_is_a_bad_node(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_CHECK_TIMEOUT_S", 0.2)
    place = open_place(run, 1, "learner", 0)
    hanging = dataclasses.replace(place.frozen, node_check="exec sleep 60")
    with pytest.raises(RoleDied, match=r"cluster\.node_check did not end in"):
        agent.check_node(dataclasses.replace(place, frozen=hanging))


def test_a_node_check_that_is_no_command_says_nothing_of_the_node(run: RunDir) -> None:
    place = open_place(run, 1, "learner", 0)
    wrong = dataclasses.replace(place.frozen, node_check="nvidia-smy -L")
    with pytest.raises(ConfigError, match=r"cluster\.node_check='nvidia-smy -L': can not be run"):
        agent.check_node(dataclasses.replace(place, frozen=wrong))
    assert not run.slurm.bad_nodes.exists()
