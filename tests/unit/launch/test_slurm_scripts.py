"""The role table and the batch scripts of GB200, H100 and a small job, against golden files; bad sites are refused.

The golden files are what this project can not run here: segments, containers, NUMA nodes. After a wanted change:
`GOLDEN=write python -m pytest tests/unit/launch/test_slurm_scripts.py`, then read the difference.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from opd_megatron.config.schema import (
    LearnerConfig,
    Recipe,
    RolloutConfig,
    ServerConfig,
    StudentConfig,
    TeacherConfig,
)
from opd_megatron.errors import ConfigError
from opd_megatron.launch.slurm.preview import Preview, processes
from opd_megatron.launch.slurm.render import render
from opd_megatron.launch.slurm.site import Site, find_sites, load_site
from opd_megatron.launch.slurm.submit import Job
from opd_megatron.launch.slurm.table import Role, read_table, role_table, segment_of, write_table
from opd_megatron.rundir import RunDir

GOLDEN = Path(__file__).parent / "golden"


def recipe(learner: int, rollout: int, teacher: int, teacher_tp: int = 1) -> Recipe:
    """A recipe with so many learner ranks, rollout servers and teacher servers."""
    return Recipe(
        name="big",
        student=StudentConfig(path="/models/student"),
        teachers={
            "main": TeacherConfig(
                path="/models/teacher",
                server=ServerConfig(num_servers=teacher, tensor_parallel=teacher_tp),
            )
        },
        rollout=RolloutConfig(server=ServerConfig(num_servers=rollout)),
        learner=LearnerConfig(data_parallel=learner),
    )


def site(name: str, *overrides: str) -> Site:
    fixed = ["cluster.python=/opt/opd/bin/python", "cluster.account=research"]
    return load_site(name, [*fixed, *overrides])


CASES = {
    "gb200-18-nodes": (
        recipe(40, 24, 2, teacher_tp=4),
        site(
            "gb200-nvl72",
            "cluster.container_image=/images/opd-aarch64.sqsh",
            "cluster.container_mounts=[/lustre:/lustre]",
        ),
    ),
    "gb200-24-nodes-2-domains": (recipe(64, 24, 2, teacher_tp=4), site("gb200-nvl72")),
    "gb200-het": (
        recipe(16, 8, 1, teacher_tp=4),
        site("gb200-nvl72", "cluster.placement=het", "cluster.share_nodes=false"),
    ),
    "h100-4-nodes": (
        recipe(16, 8, 1, teacher_tp=8),
        site("h100", "cluster.gpu_flag=gres", "cluster.interface=ib0", "cluster.qos=high"),
    ),
    "generic-1-node": (recipe(4, 2, 1, teacher_tp=2), site("generic")),
}  # fmt: skip


RUN = RunDir(Path("/lustre/runs/big"))


def _golden(path: Path, text: str) -> str:
    """What the file holds; GOLDEN=write makes that the text."""
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    return path.read_text()


def _previews(name: str) -> list[Preview]:
    big, where = CASES[name]
    return list(processes(Job(big, Path("big.py"), (), where, role_table(big, where), RUN, "")))


@pytest.mark.parametrize("name", CASES)
def test_script_is_the_golden_one(name: str) -> None:
    job, where = CASES[name]
    path = GOLDEN / f"{name}.sh"
    text = render(where, role_table(job, where), RUN, "opd-big")
    assert text == _golden(path, text)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", ["gb200-het", "h100-4-nodes"])
def test_what_the_nodes_start_is_the_golden_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs, NUMA nodes, interfaces, the learner's world."""
    for variable in ("CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    text = "".join(f"{p.line()}\n" for p in _previews(name))
    assert text == _golden(GOLDEN / f"{name}.commands", text)


def test_the_dry_run_shows_every_process_with_its_node_and_gpus() -> None:
    shown = _previews("gb200-18-nodes")
    assert len(shown) == 1 + 10 + 24 + 2  # controller, learner nodes, rollout servers, teachers
    assert len({p.line() for p in shown}) == len(shown)
    by_name = {p.name: p for p in shown}
    fifth, teacher = by_name["rollout-5"], by_name["teacher-main-1"]
    assert (fifth.node, fifth.environment["CUDA_VISIBLE_DEVICES"]) == ("node 11", "1")
    assert (teacher.node, teacher.environment["CUDA_VISIBLE_DEVICES"]) == ("node 17", "0,1,2,3")
    assert fifth.argv[:4] == ["numactl", "--cpunodebind=0", "--membind=0", "/opt/opd/bin/python"]
    assert fifth.argv[fifth.argv.index("--host") + 1] == "NODE_ADDRESS"
    learners = [p for p in shown if p.name == "learner"]
    assert [p.node for p in learners] == [f"node {n}" for n in range(10)]
    assert "10,9,NODE_ADDRESS,0" in learners[9].argv


def test_roles_stand_one_after_the_other_and_share_a_node_where_they_fit() -> None:
    where = site("generic")
    table = role_table(recipe(16, 6, 1, teacher_tp=2), where)
    places = {r.name: (r.nodes, r.first_node, r.devices, r.first_device) for r in table.roles}
    assert places == {
        "controller": (1, 0, 0, 0),
        "learner": (2, 0, 8, 0),
        "rollout": (1, 2, 6, 0),
        "teacher-main": (1, 2, 2, 6),
    }
    assert table.nodes == 3
    alone = role_table(
        recipe(16, 6, 1, teacher_tp=2), dataclasses.replace(where, share_nodes=False)
    )
    assert alone.role("teacher-main").first_node == 3


def test_servers_are_spread_over_the_nodes_of_their_role() -> None:
    role = role_table(recipe(8, 10, 1), site("gb200-nvl72")).role("rollout")
    assert (role.nodes, role.processes) == (3, 4)
    assert [list(role.on_node(i)) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("nodes", "segment"), [(1, 1), (16, 16), (18, 18), (20, 10), (36, 18), (19, 1), (34, 17)]
)
def test_a_segment_divides_the_job_and_fits_a_domain(nodes: int, segment: int) -> None:
    assert segment_of(site("gb200-nvl72"), nodes) == segment


def test_the_table_survives_its_file(tmp_path: Path) -> None:
    where = site("gb200-nvl72")
    table = role_table(recipe(16, 8, 1), where)
    path = tmp_path / "roles.json"
    write_table(path, table, dataclasses.replace(where, secrets={"HF_TOKEN": "~/.hf"}))
    frozen = read_table(path)
    assert frozen.table == table
    assert frozen.secrets == {"HF_TOKEN": "~/.hf"}
    assert isinstance(frozen.table.roles[0], Role)


@pytest.mark.parametrize("name", find_sites())
def test_every_site_file_is_valid_and_says_what_it_is(name: str) -> None:
    assert load_site(name).summary


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.acount=x", "did you mean 'account'"),
        ("cluster.account=a b", "stands in an #SBATCH line"),
        ("cluster.account=$(id)", "stands in an #SBATCH line"),
        ("cluster.partition=None", "is the word for no value"),
        ("cluster.time=soon", "not a Slurm time"),
        ("cluster.gpu_flag=gpus", "must be one of"),
        ("cluster.segment=big", "must be auto, none or a number"),
        ("cluster.devices_per_node=0", "must be at least 1"),
        ("cluster.placement=het", "stand alone"),
        ("cluster.grace_s=soon", "grace_s"),
        ("cluster.environment.SLURM_CONF=x", "not a variable name of its own"),
        ("cluster.environment.A-B=x", "not a variable name of its own"),
        ("cluster.container_mounts=['/a:/a,/b:/b']", "one `FROM:TO"),
        ("cluster.constraint=a b", "stands in an #SBATCH line"),
        ("cluster.exclusive=false", "set cluster.cpus_per_node"),
        ("cluster.sbatch_options=['--time=1']", "that no other key decides"),
        ("cluster.sbatch_options=['-N 4']", "must be `--name`"),
        ("cluster.sbatch_options=['--licenses=a b']", "stands in an #SBATCH line"),
    ],
)
def test_a_bad_site_value_is_refused_with_its_key(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        load_site("generic", [override])
    assert words in str(caught.value)


def test_what_a_site_asks_for_stands_in_its_lines() -> None:
    where = site(
        "generic",
        "cluster.exclusive=false",
        "cluster.cpus_per_node=32",
        "cluster.memory=200G",
        "cluster.gpu_type=h100",
        "cluster.constraint=(ib&h100)|!old",
        "cluster.sbatch_options=['--licenses=scratch:1', --no-kill]",
    )
    job = recipe(4, 2, 1)
    script = render(where, role_table(job, where), RunDir(Path("/runs/x")), "opd-x")
    lines = {line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line}
    assert {"--cpus-per-task=32", "--mem=200G", "--gpus-per-node=h100:8"} <= lines
    assert {"--constraint=(ib&h100)|!old", "--licenses=scratch:1", "--no-kill"} <= lines
    assert "--exclusive" not in lines
    assert "--gpus-per-node=h100:8 " in script, "steps ask for the same"


def test_what_can_not_be_placed_is_refused() -> None:
    with pytest.raises(ConfigError, match="can not span nodes"):
        role_table(recipe(4, 1, 1, teacher_tp=8), site("gb200-nvl72"))
    with pytest.raises(ConfigError, match="does not divide into nodes"):
        role_table(recipe(6, 1, 1), site("gb200-nvl72"))
    odd = dataclasses.replace(recipe(4, 1, 1), teachers={"a b": TeacherConfig(path="/t")})
    with pytest.raises(ConfigError, match="letters, digits"):
        role_table(odd, site("generic"))


@pytest.mark.parametrize("folder", ["/runs/a b", "/runs/$(id)", "/runs/%j", "/runs/a'b"])
def test_a_run_directory_that_sbatch_would_read_otherwise_is_refused(folder: str) -> None:
    where = site("generic")
    with pytest.raises(ConfigError, match="--run-dir"):
        render(where, role_table(recipe(4, 1, 1), where), RunDir(Path(folder)), "opd-x")
