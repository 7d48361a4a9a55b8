"""`opd submit` without a cluster: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from opd_megatron.cli.app import main
from opd_megatron.config.recipes import find_recipes, resolve_recipe
from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.errors import ConfigError
from opd_megatron.launch.slurm import queue
from opd_megatron.launch.slurm.begin import claim, idle_attempts
from opd_megatron.launch.slurm.site import load_site
from opd_megatron.launch.slurm.source import check_source, record_source
from opd_megatron.launch.slurm.submit import plan, resume, write_job
from opd_megatron.rundir import RunDir

WHERE = ["--cluster", "cpu-test", "--via", "sbatch", "--allow-dirty"]


def opd(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_dry_run_prints_the_very_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run"
    own = ["submit", "demo", "steps=3", "--run-dir", str(target), *WHERE]
    assert opd(*own, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert not target.exists()
    assert "# teacher-main " in dry
    assert opd(*own, "--render", str(tmp_path / "job.sh")) == 0
    assert f"submit it with: sbatch {tmp_path}/job.sh" in capsys.readouterr().out
    script = (tmp_path / "job.sh").read_text()
    assert script == RunDir(target).slurm.script.read_text()
    assert dry.endswith(script)
    assert max(len(line) for line in dry.splitlines()) > 200, "commands are not wrapped"
    assert read_run_yaml(RunDir(target).run_yaml).steps == 3
    assert opd(*own, "--render", str(tmp_path / "job.sh")) == 78
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "demo"], "--cluster"),
        (["submit", "demo", "--cluster", "gb20-nvl72"], "did you mean 'gb200-nvl72'"),
        (["submit", "demo", *WHERE, "--via", "pigeon"], "must be nemo-run or sbatch"),
        (["submit", "demo", *WHERE, "cluster.tiem=1"], "did you mean 'time'"),
        (["submit", "demo", *WHERE, "learner.tensor_paralel=2"], "did you mean"),
        (["submit", "demo", *WHERE, "student.path=/nowhere"], "no such directory"),
        (["status", "/nowhere"], "holds no Slurm job"),
        (["resume", "/nowhere"], "holds no Slurm job"),
    ],
)
def test_a_mistake_ends_with_78_before_anything_is_written(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "submit":
        arguments = [*arguments, "--run-dir", str(tmp_path / "run")]
    assert opd(*arguments) == 78
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _repository(folder: Path) -> Path:
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    (folder / "old.py").write_text("y = 1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    return folder


def test_a_changed_checkout_is_refused_or_its_difference_is_kept(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    root = _repository(tmp_path / "source")
    assert check_source(False, root)["git"]["dirty"] is False
    (root / "new.py").write_text("x = 1\n")
    (root / "old.py").write_text("y = 2\n")
    with pytest.raises(ConfigError, match="differs from its commit"):
        check_source(False, root)
    run = RunDir(tmp_path / "run")
    run.slurm.root.mkdir(parents=True)
    record_source(run, check_source(True, root), root)
    assert json.loads((run.slurm.root / "source.json").read_text())["git"]["dirty"] is True
    # A fresh checkout with the difference is the tree that was submitted.
    fresh = tmp_path / "fresh"
    subprocess.run(["git", "clone", "-q", str(root), str(fresh)], check=True)
    difference = str(run.slurm.root / "source.diff")
    subprocess.run(["git", "-C", str(fresh), "apply", difference], check=True)
    assert (fresh / "new.py").read_text() == "x = 1\n"
    assert (fresh / "old.py").read_text() == "y = 2\n"
    status = ["git", "-C", str(root), "status", "--porcelain"]
    seen = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert seen == " M old.py\n?? new.py\n", "the checkout's own index is as it was"
    assert not (run.slurm.root / ".git-index").exists()


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    recipe, path = resolve_recipe("demo", [])
    job = plan(recipe, path, [], load_site("cpu-test"), RunDir(tmp_path / "run"))
    write_job(job, {"git": None})
    job.run.done.touch()
    with pytest.raises(ConfigError, match="the run is done"):
        resume(job.run)


def test_a_resumed_run_has_its_attempts_again_and_leaves_bad_nodes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, path = resolve_recipe("demo", [])
    site = load_site("cpu-test", ["cluster.exclude=gb[1-2]"])
    run = RunDir(tmp_path / "run")
    write_job(plan(recipe, path, [], site, run), {"git": None})
    said = tmp_path / "said"
    _fake(tmp_path, monkeypatch, sbatch=f'echo "$@" >{said}; echo 12', scontrol="exit 1")
    for _ in range(3):
        claim(run, "1")
    run.slurm.bad_nodes.write_text("n9\nn2\nn9\n")
    assert idle_attempts(run) == 3
    monkeypatch.setattr(queue, "living_job", lambda _: None)
    assert resume(run) == "12"
    assert idle_attempts(run) == 0
    assert f"--exclude=n2,n9,gb[1-2] {run.slurm.script}" in said.read_text()


def test_a_command_of_slurm_that_is_missing_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="run this on a login node"):
        queue.state_of("1")


def test_a_local_run_stays_out_of_a_directory_whose_job_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    queue.refuse_living_job(run)
    run.slurm.root.mkdir()
    run.slurm.owner.write_text("12\n")
    attempt = run.attempt(1)
    attempt.root.mkdir(parents=True)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="job 12 may be alive"):
        queue.refuse_living_job(run)
    attempt.ended.write_text("75\n")
    queue.refuse_living_job(run)


def _fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Slurm's commands as they answer when something is wrong."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("sbatch: error: invalid partition specified: bach", 78),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", 75),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 75),
    ],
)
def test_a_refused_job_leaves_no_run_directory(
    words: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs, target = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    _fake(programs, monkeypatch, sbatch=f"echo '{words}' >&2; exit 1")
    own = ["submit", "demo", "--run-dir", str(target), *WHERE]
    assert opd(*own) == code
    assert words.removeprefix("sbatch: error: ") in capsys.readouterr().err
    assert not target.exists()
    _fake(programs, monkeypatch, sbatch="echo 12")
    assert opd(*own) == 0
    assert capsys.readouterr().out.splitlines()[-3] == "job 12"


def test_the_gpu_of_a_login_node_is_not_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fake(tmp_path, monkeypatch, **{"nvidia-smi": "echo 'Tesla V100-SXM2-16GB, 7.0'"})
    recipe = ["demo", "device=cuda", "learner.precision=fp8"]
    assert opd("validate", *recipe) == 78
    assert "GPU 0 of this machine" in capsys.readouterr().err
    assert opd("submit", *recipe, *WHERE, "--dry-run", "--run-dir", str(tmp_path / "run")) == 0


def test_a_site_may_say_where_its_models_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(find_recipes()["demo"].parent / "demo/student", tmp_path / "org/student")
    own = ["submit", "demo", "student.path=org/student", *WHERE, "--dry-run", "--run-dir", "/r/x"]
    assert opd(*own) == 78
    assert "not on this machine" in capsys.readouterr().err
    assert opd(*own, f"cluster.environment.OPD_MODELS={tmp_path}") == 0
    assert f"--model-path {tmp_path}/org/student " in capsys.readouterr().out


def test_without_an_answer_of_slurm_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs, target = tmp_path / "bin", str(tmp_path / "run")
    programs.mkdir()
    down = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    _fake(programs, monkeypatch, sbatch="echo 12", scontrol=down)
    assert opd("submit", "demo", "--run-dir", target, *WHERE) == 0
    capsys.readouterr()
    assert opd("status", target) == 0
    out = capsys.readouterr().out
    assert "job 12: UNKNOWN slurm_load_jobs error: Unable to contact" in out
    assert "opd resume" not in out
    for command in ("cancel", "resume"):
        assert opd(command, target) == 75
        assert "Slurm can not say how job 12 is" in capsys.readouterr().err


def test_a_large_job_is_shown_without_its_models(capsys: pytest.CaptureFixture[str]) -> None:
    name = "qwen3_4b_base_from_qwen3_32b_32gpu_gb200_mxfp8"
    where = [
        "--cluster",
        "gb200-nvl72",
        "--via",
        "sbatch",
        "--dry-run",
        "--run-dir",
        "/lustre/runs/x",
    ]
    assert opd("submit", name, *where) == 78
    assert "not on this machine" in capsys.readouterr().err
    assert opd("submit", name, *where, "--offline") == 0
    out = capsys.readouterr().out
    assert "# not checked here: " in out
    assert "#SBATCH --nodes=8" in out and "#SBATCH --segment=8" in out


def test_a_job_over_ssh_needs_nemo_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["cluster.ssh_host=login", "cluster.run_root=/runs"]
    assert opd("submit", "demo", *WHERE, *there) == 78
    assert "say --via nemo-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "where", ["cluster.run_root=runs", "cluster.run_root=~/runs", "--run-dir=x"]
)
def test_a_run_directory_on_another_machine_is_a_whole_path(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["submit", "demo", "--cluster", "cpu-test", "--allow-dirty", "cluster.ssh_host=login"]
    assert opd(*there, where) == 78
    assert "with ssh_host must be a whole path" in capsys.readouterr().err


def test_a_container_that_does_not_see_the_models_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["submit", "demo", *WHERE, "--dry-run", "cluster.container_image=/images/opd.sqsh"]
    there += ["--run-dir", str(tmp_path / "run")]
    recipes = str(find_recipes()["demo"].parent)
    assert opd(*there) == 78
    words = capsys.readouterr().err
    assert "student.path=" in words and f"add {recipes}/demo:{recipes}/demo" in words
    for mounts in ("[/]", f"[{recipes}]", f"[/somewhere:{recipes}:ro]"):
        assert opd(*there, f"cluster.container_mounts={mounts}") == 0
    mounts = f"cluster.container_mounts=[{recipes}:{recipes}]"
    for secret, rule in (("~/.token", "another home"), ("/etc/token", "does not see it")):
        assert opd(*there, mounts, f"cluster.secrets.TOKEN={secret}") == 78
        assert rule in capsys.readouterr().err
