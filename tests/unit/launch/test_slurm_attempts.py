"""Who may begin an attempt, what counts as progress, secrets, addresses, and what Slurm's words mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.atomic import write_json
from opd_megatron.config.run_yaml import read_run_mapping, read_run_yaml, write_run_yaml
from opd_megatron.config.schema import DataConfig, Recipe, StudentConfig
from opd_megatron.controller.stop import refuse_if_fenced
from opd_megatron.errors import ConfigError, Fenced, RoleDied
from opd_megatron.launch.slurm import nodes, secrets
from opd_megatron.launch.slurm.begin import claim, idle_attempts, located
from opd_megatron.launch.slurm.queue import JobState, add_job, jobs_of, parse_job
from opd_megatron.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path)
    made.slurm.root.mkdir()
    return made


def test_of_two_jobs_that_begin_at_once_one_is_refused(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(run, "1")
    # The second looked before the first had made its attempt.
    monkeypatch.setattr(RunDir, "attempts", lambda _: [])
    with pytest.raises(ConfigError, match="another job has just taken it"):
        claim(run, "2")
    assert run.slurm.owner.read_text() == "1\n"


def test_an_attempt_is_fenced_by_a_later_one(run: RunDir) -> None:
    first = claim(run, "1")
    refuse_if_fenced(first)
    second = claim(run, "2")
    refuse_if_fenced(second)
    with pytest.raises(Fenced, match="attempt 1: a later attempt"):
        refuse_if_fenced(first)


def test_a_job_submitted_by_hand_is_known_from_its_first_attempt_on(run: RunDir) -> None:
    add_job(run, "7")
    for job in ("7", "8", "8"):
        claim(run, job)
    add_job(run, "8")  # `opd submit` was slower than the job
    assert jobs_of(run) == ["7", "8"]


def test_attempts_are_idle_from_the_newest_commit_on(run: RunDir) -> None:
    run.checkpoints.mkdir()
    assert idle_attempts(run) == 0
    claim(run, "1")
    claim(run, "1")
    assert idle_attempts(run) == 2
    (run.checkpoints / "step_000005").mkdir()
    assert idle_attempts(run) == 0
    for _ in range(3):
        claim(run, "1")
    assert idle_attempts(run) == 3


def test_an_attempt_that_was_asked_to_stop_is_excused(run: RunDir) -> None:
    claim(run, "1").stop_requested.touch()
    claim(run, "1")
    assert idle_attempts(run) == 1


def test_an_attempt_that_the_time_limit_ended_counts(run: RunDir) -> None:
    """Else a step that is longer than the job would begin again for ever."""
    for _ in range(2):
        claim(run, "1").stop_requested.write_text("USR1\n")
    claim(run, "1").stop_requested.write_text("TERM\n")
    claim(run, "1")
    assert idle_attempts(run) == 3


def test_names_are_found_on_the_node_where_the_submitter_had_no_files(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        student=StudentConfig(path="Qwen/Qwen3-4B-Base"),
        data=DataConfig(train="math/train.parquet"),
    )
    write_run_yaml(run.run_yaml, recipe, Path("/there/own.py"), ["steps=3"])
    before = run.run_yaml.read_bytes()
    assert located(run) == recipe and run.run_yaml.read_bytes() == before
    (tmp_path / "models" / "Qwen3-4B-Base").mkdir(parents=True)
    (tmp_path / "data" / "math").mkdir(parents=True)
    (tmp_path / "data/math/train.parquet").touch()
    monkeypatch.setenv("OPD_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("OPD_DATA", str(tmp_path / "data"))
    found = located(run)
    assert found.student.path == str(tmp_path / "models/Qwen3-4B-Base")
    assert found.data.train == str(tmp_path / "data/math/train.parquet")
    assert read_run_yaml(run.run_yaml) == found, "the other nodes read the same"
    content = read_run_mapping(run.run_yaml)
    assert (content["recipe_file"], content["overrides"]) == ("/there/own.py", ["steps=3"])


def test_a_secret_is_read_from_a_private_file_only(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("value\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 644 lets others read it"):
        secrets.read({"TOKEN": str(path)})
    path.chmod(0o600)
    assert secrets.read({"TOKEN": str(path)}) == {"TOKEN": "value"}
    path.write_text("two\nlines\n")
    with pytest.raises(ConfigError, match="must hold one line") as caught:
        secrets.read({"TOKEN": str(path)})
    assert "two" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cluster\.secrets\.TOKEN"):
        secrets.read({"TOKEN": str(tmp_path / "absent")})


def test_a_node_is_reached_by_the_interface_that_was_named() -> None:
    assert nodes.own_address("lo", alone=False) == "127.0.0.1"
    assert nodes.own_address("", alone=True) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"cluster\.interface='nope0'.*known: .*lo"):
        nodes.own_address("nope0", alone=False)


def test_a_name_that_other_nodes_would_resolve_to_themselves_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    with pytest.raises(ConfigError, match="resolves to loopback"):
        nodes.own_address("", alone=False)


def test_nodes_wait_for_each_other_until_the_deadline_or_the_end(tmp_path: Path) -> None:
    said = nodes.NodeFile("id", "n1", "10.0.0.1", (20001,), ({"name": "r-0", "url": "http://x"},))
    nodes.write_node(tmp_path, "rollout", 0, said)
    there, absent = (nodes.path_of(tmp_path, "rollout", i) for i in (0, 1))
    assert nodes.wait_for_nodes([there], 1, lambda: False) == [said]
    with pytest.raises(RoleDied, match="rollout-1: not started after 0 s"):
        nodes.wait_for_nodes([there, absent], 0, lambda: False)
    with pytest.raises(RoleDied, match="the attempt ended before rollout-1"):
        nodes.wait_for_nodes([there, absent], 60, lambda: True)


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (
            "JobId=7 JobName=opd-demo JobState=RUNNING Reason=None Restarts=2 NodeList=n[1-3] BatchHost=n1",
            JobState("7", "RUNNING", "", "n[1-3]", 2),
        ),
        (
            "JobId=7 JobState=PENDING Reason=BeginTime Restarts=1 NodeList=(null)",
            JobState("7", "PENDING", "BeginTime", "", 1),
        ),
        ("", JobState("7", "UNKNOWN")),
    ],
)
def test_what_scontrol_says_is_understood(line: str, state: JobState) -> None:
    assert parse_job("7", line) == state


def test_a_state_says_whether_a_job_waits_or_lives() -> None:
    assert JobState("7", "COMPLETING").is_alive
    assert JobState("7", "PENDING").is_waiting
    assert not JobState("7", "FAILED").is_alive and not JobState("7", "FAILED").is_waiting


def test_a_commit_name_is_all_that_progress_needs(run: RunDir) -> None:
    attempt = claim(run, "3")
    write_json(attempt.root / "owner.json", {"job": "3", "commit": "step_000009"})
    assert idle_attempts(run) == 0
