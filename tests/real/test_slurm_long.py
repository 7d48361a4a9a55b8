"""Jobs that take minutes: the whole demo, heterogeneous, pre-empted, at the time limit, requeued through NeMo-Run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import hosts, log, opd, submit, wait_done, wait_for, wait_over
from whole_runs import check_commits, check_finished, rows

from opd_megatron.launch.slurm.queue import jobs_of
from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("via", ["sbatch", "nemo-run"])
def test_the_whole_demo_reaches_its_accuracy_and_the_next_job_of_a_chain_finds_it_done(
    cluster: Cluster, tmp_path: Path, via: str
) -> None:
    if via == "nemo-run":
        pytest.importorskip("nemo_run", reason="NO NEMO-RUN HERE: `make install-launch` adds it")
    run = RunDir(tmp_path / "run")
    where = ("--cluster", "cpu-test", "--run-dir", str(run.root), "--allow-dirty", "--via", via)
    opd(cluster, "submit", "demo", *where)
    (job,) = jobs_of(run)
    chained = cluster.call(
        "sbatch", "--parsable", f"--dependency=afterany:{job}", str(run.slurm.script)
    ).stdout.strip()
    wait_done(cluster, run, 800)
    summary = json.loads(run.summary.read_text())
    assert summary["accuracy_after"] > 0.8 > summary["accuracy_before"]
    wait_for(run, lambda: cluster.state(chained) == "COMPLETED", 60, "the chained job")
    assert log(run).count("the run is done") == 2


def test_a_heterogeneous_job_requeues_itself_and_reaches_its_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    settings = ["steps=6", "checkpoint.every=100", "evaluation.every=0"]
    run = submit(cluster, tmp_path, *settings, "cluster.placement=het")
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    (job,) = jobs_of(run)
    shown = cluster.call("scontrol", "-o", "show", "job", job).stdout.splitlines()
    assert len(shown) == 3, "learner with controller, rollout, teacher"
    assert all("TimeLimit=00:10:00" in line for line in shown)
    assert cluster.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
    wait_for(run, lambda: "attempt 2\n" in log(run), 90, "the second attempt")
    committed = check_commits(run)
    assert 1 <= committed < 6
    wait_done(cluster, run, 400)
    assert f"resumed from step_{committed:06d}" in log(run)
    check_finished(run, 6)
    assert jobs_of(run) == [job]


def test_preemption_commits_and_the_run_goes_on_afterwards(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submit(cluster, tmp_path, "steps=30", "checkpoint.every=100", "evaluation.every=0")
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    urgent = cluster.call(
        "sbatch", "--parsable", "-p", "urgent", f"--nodes={cluster.num_nodes}", "--exclusive",
        "--output", str(tmp_path / "urgent.log"), "--wrap", "sleep 3",
    ).stdout.strip()  # fmt: skip
    wait_for(run, lambda: cluster.state(urgent) == "COMPLETED", 120, "the urgent job")
    committed = check_commits(run)
    assert 1 <= committed < 30
    wait_done(cluster, run, 300)
    assert f"resumed from step_{committed:06d}" in log(run)
    check_finished(run, 30)


def test_a_time_limit_commits_and_the_next_restart_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Slurm itself sends the signal, `grace_s` (or up to a minute more) before the limit."""
    run = submit(
        cluster,
        tmp_path,
        *("steps=500", "checkpoint.every=1000", "evaluation.every=0"),
        *("cluster.time=00:03:00", "cluster.grace_s=60"),
    )
    wait_for(run, lambda: "USR1: asked the controller" in log(run), 200, "Slurm's signal")
    wait_for(run, lambda: "attempt 2\n" in log(run), 90, "the second attempt")
    committed = check_commits(run)
    assert committed >= 1
    resumed = f"resumed from step_{committed:06d}"
    wait_for(run, lambda: resumed in log(run), 120, "the resume")
    opd(cluster, "cancel", str(run.root))
    wait_over(cluster, run)


def test_a_run_through_nemo_run_goes_on_after_a_requeue(cluster: Cluster, tmp_path: Path) -> None:
    """On two nodes: both servers share the second."""
    pytest.importorskip("nemo_run", reason="NO NEMO-RUN HERE: `make install-launch` adds it")
    settings = ["steps=6", "evaluation.every=0", "cluster.share_nodes=true"]
    run = submit(cluster, tmp_path, *settings, via="nemo-run")
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    places = hosts(run, 1)
    assert set(places) == {"learner-0", "rollout-0", "teacher-main-0"}
    assert places["rollout-0"] == places["teacher-main-0"]
    if cluster.own_names:
        assert places["learner-0"] != places["rollout-0"]
    (job,) = jobs_of(run)
    assert cluster.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
    wait_done(cluster, run, 300)
    assert "resumed from step_" in log(run)
    check_finished(run, 6)
    assert "restarts 1" in opd(cluster, "status", str(run.root))
