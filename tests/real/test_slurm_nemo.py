"""A run through NeMo-Run to its end, and each of its known defects kept away from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ssh_server
from slurm_cluster import Cluster
from slurm_runs import (
    check_whole,
    hosts,
    last_step,
    log,
    opd,
    submit,
    wait_done,
    wait_for,
    wait_over,
    whole_demo,
)
from whole_runs import ROOT, SMALL

from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.errors import ServerError
from opd_megatron.launch.slurm import nemo
from opd_megatron.launch.slurm.queue import jobs_of
from opd_megatron.launch.slurm.site import load_site
from opd_megatron.launch.slurm.submit import plan
from opd_megatron.rundir import RunDir

pytest.importorskip("nemo_run", reason="NO NEMO-RUN HERE: `make install-launch` adds it")
pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

# What NeMo-Run would cut at the space, run, upper-case, or leak into a trace.
HOSTILE = {"lower_case": "two words", "COMMAND": "$(touch hacked)", "QUOTES": 'it\'s "so"'}
SECRET = "the-secret-itself"


def _timeless(script: str) -> str:
    """NeMo-Run names an experiment by the time."""
    return re.sub(r"opd_\d{10,}", "opd_TIME", script)


@pytest.mark.ci
@pytest.mark.timeout(2700)
def test_the_whole_demo_through_nemo_run_is_what_the_dry_run_said_and_goes_on_after_a_signal(
    cluster: Cluster, tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    settings = [
        *("checkpoint.every=100", f"cluster.secrets.MY_TOKEN={secret}"),
        *(f"cluster.environment.{name}={value}" for name, value in HOSTILE.items()),
        # Runs on every node, in the role's environment.
        f"cluster.node_check=env -0 > {tmp_path}/$SLURM_STEP_ID.env",
    ]
    arguments = whole_demo(tmp_path, "nemo-run", *settings)
    dry = opd(cluster, *arguments, "--dry-run")
    run = RunDir(tmp_path / "run")
    assert not run.root.exists()
    opd(cluster, *arguments)
    assert run.slurm.script.read_text() in dry
    (submitted,) = (run.slurm.root / "nemo-run").glob("experiments/*/*/*_sbatch.sh")
    assert _timeless(submitted.read_text()).strip() in _timeless(dry)
    assert opd(cluster, "status", str(run.root)).count("job ") == 1
    wait_for(run, lambda: last_step(run) >= 1, 300, "the first step")
    assert set(hosts(run, 1)) == {"learner-0", "rollout-0", "teacher-main-0"}
    (job,) = jobs_of(run)
    assert cluster.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
    wait_done(cluster, run, 800)
    assert "USR1: asked the controller to commit and end" in log(run)
    assert "resumed from step_" in log(run)
    check_whole(run, attempts=2)
    assert "step 60/60" in opd(cluster, "logs", str(run.root))
    status = opd(cluster, "status", str(run.root))
    assert "COMPLETED" in status and "restarts 1" in status and "step 60 of 60" in status
    _check_environment(tmp_path)
    _check_no_secret(run.root, dry)


def _check_environment(folder: Path) -> None:
    files = list(folder.glob("*.env"))
    assert len(files) == 4  # controller, learner, rollout, teacher: the same steps in both attempts
    for path in files:
        lines = path.read_bytes().decode().split("\0")
        found = {name: value for name, _, value in (line.partition("=") for line in lines)}
        assert {name: found[name] for name in HOSTILE} == HOSTILE
        assert "LOWER_CASE" not in found
    assert not list(folder.rglob("hacked"))


def _check_no_secret(root: Path, dry: str) -> None:
    assert SECRET not in dry
    for path in root.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_failed_job_is_not_a_success(cluster: Cluster, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(ROOT / "recipes/demo/student", student)
    with cluster.paused():  # else the job may begin before the file is broken
        run = submit(cluster, tmp_path, f"student.path={student}", via="nemo-run")
        (student / "config.json").write_text("{")
    wait_over(cluster, run, 120)
    (job,) = jobs_of(run)
    assert "ExitCode=78:0" in cluster.call("scontrol", "show", "job", job).stdout, log(run)
    assert "config.json" in log(run) and "restart 1" not in log(run)
    status = opd(cluster, "status", str(run.root))
    assert "FAILED" in status and "not done" in status


@pytest.mark.slow
@pytest.mark.skipif(
    bool(ssh_server.missing()), reason=f"NO SSH HERE: {', '.join(ssh_server.missing())} missing"
)
def test_a_run_is_carried_over_ssh_and_begins_on_the_other_side(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "there" / "run")
    there = {name: cluster.environment[name] for name in ("SLURM_CONF", "PATH")}
    here = {k: v for k, v in os.environ.items() if k != "SLURM_CONF"} | {"PYTHONPATH": str(ROOT)}
    with ssh_server.login_node(tmp_path, {**there, "PYTHONPATH": str(ROOT)}) as login:
        here["PATH"] = f"{login.programs}:{os.environ['PATH']}"
        arguments = [
            *(sys.executable, "-m", "opd_megatron", "submit", "demo", *SMALL, "steps=500"),
            *("--cluster", "cpu-test", "--run-dir", str(run.root), "--allow-dirty"),
            *("cluster.ssh_host=127.0.0.1", f"cluster.ssh_port={login.port}"),
            *(f"cluster.ssh_user={login.user}", f"cluster.ssh_identity={login.identity}"),
            *(f"cluster.ssh_job_dir={tmp_path}/there/jobs", f"cluster.python={sys.executable}"),
        ]
        done = subprocess.run(
            arguments, env=here, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        again = subprocess.run(
            arguments, env=here, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert again.returncode == 75, "a run that is there is not written over"
    (job,) = jobs_of(run)
    assert f"job {job}\n" in done.stdout
    wait_for(run, lambda: "attempt 1\n" in log(run), 60, "the first attempt")
    opd(cluster, "cancel", str(run.root))
    wait_over(cluster, run)


def test_what_nemo_run_can_not_carry_is_refused_before_it_starts(cluster: Cluster) -> None:
    base = ("submit", "demo", "--cluster", "cpu-test", "--dry-run")
    assert "--via sbatch" in opd(cluster, *base, "cluster.requeue=false", code=78)
    assert "--via sbatch" in opd(cluster, *base, "cluster.placement=het", code=78)


def test_a_script_with_a_fault_is_never_submitted() -> None:
    recipe, path = resolve_recipe("demo", [])
    job = plan(recipe, path, [], load_site("cpu-test"), RunDir(Path("/runs/x")))
    good = nemo.dry_run(job)
    request = nemo.request_of(job)
    nemo.verify(good, request)
    for broken, words in (
        (good.replace("#SBATCH --nodes=3", "#SBATCH --nodes=None"), "without a value"),
        (good.replace("#SBATCH --nodes=3\n", ""), "left out --nodes=3"),
        (good.replace("set +e", "export FOO=bar"), "FOO"),
        (good.replace("exec bash", "bash"), "hand over"),
    ):
        assert broken != good
        with pytest.raises(ServerError, match=words):
            nemo.verify(broken, request)
