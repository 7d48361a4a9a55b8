"""Runs as jobs of a real Slurm: to the end, and through everything that ends an attempt before it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import (
    hosts,
    log,
    opd,
    submit,
    wait_done,
    wait_for,
    wait_over,
)
from whole_runs import ROOT, check_commits, check_finished, rows

from opd_megatron.launch.slurm.queue import jobs_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


def test_a_signal_commits_and_requeues_and_the_run_goes_on_to_its_end(
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    """Five nodes: the learner on two of them. `checkpoint.every` never comes: the signal alone commits."""
    run = submit(
        cluster,
        tmp_path,
        "steps=6",
        "checkpoint.every=100",
        "cluster.devices_per_node=1",
        "evaluation.every=0",
    )
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    places = hosts(run, 1)
    assert set(places) == {"learner-0", "learner-1", "rollout-0", "teacher-main-0"}
    if cluster.own_names:
        assert len(set(places.values())) == 4
    (job,) = jobs_of(run)
    assert cluster.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
    wait_for(run, lambda: "attempt 2" in log(run), 90, "the second attempt")
    first_commit = check_commits(run)
    assert 1 <= first_commit < 6, "the signal came before the run's end"
    assert "USR1: asked the controller to commit and end" in log(run)
    wait_done(cluster, run)
    assert f"resumed from step_{first_commit:06d}" in log(run)
    check_finished(run, 6)
    assert "restarts 1" in opd(cluster, "status", str(run.root))


def test_a_dead_node_requeues_the_job_and_cancel_leaves_nothing(
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    run = submit(cluster, tmp_path, "steps=500")
    nodes = run.attempt(1).nodes
    wait_for(run, lambda: (nodes / "teacher-main-0.json").exists(), 60, "the teacher's node")
    second = cluster.call(
        "sbatch",
        "--parsable",
        "--nodes=1",
        "--output",
        str(tmp_path / "second.log"),
        str(run.slurm.script),
    )
    job = second.stdout.strip()
    wait_for(run, lambda: cluster.state(job) == "FAILED", 60, "the second job to be refused")
    assert "is alive in" in (tmp_path / "second.log").read_text()
    node = hosts(run, 1)["teacher-main-0"] if cluster.own_names else "n3"
    cluster.kill_node(node)
    try:
        wait_for(run, lambda: "restart 1" in log(run), 90, "the restart on other nodes")
        wait_for(run, lambda: "attempt 2" in log(run), 60, "the second attempt")
        assert opd(cluster, "cancel", str(run.root)).startswith("cancelled ")
        wait_over(cluster, run)
        assert "not done; go on with: opd resume" in opd(cluster, "status", str(run.root))
    finally:
        cluster.start_node(node)
    cluster.wait_idle()


def test_what_must_change_first_ends_the_job_without_a_requeue(
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    student = tmp_path / "student"
    shutil.copytree(ROOT / "recipes/demo/student", student)
    run = submit(cluster, tmp_path, f"student.path={student}", "cluster.setup=[sleep 1]")
    (student / "config.json").write_text("{")
    wait_over(cluster, run, 120)
    assert not run.done.exists()
    assert "restart 1" not in log(run)
    assert "config.json" in log(run)
    (job,) = jobs_of(run)
    assert cluster.state(job) == "FAILED"
    assert "ExitCode=78:0" in cluster.call("scontrol", "show", "job", job).stdout


def test_a_bad_node_is_left_out_by_the_job_that_goes_on(
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    run = submit(cluster, tmp_path, "steps=500", "cluster.node_check='test $SLURMD_NODENAME != n2'")
    wait_for(run, lambda: len(jobs_of(run)) == 2, 90, "the successor")
    assert run.slurm.bad_nodes.read_text().split() == ["n2"]
    successor = jobs_of(run)[1]
    wait_for(run, lambda: cluster.state(successor) == "RUNNING", 60, "the successor to run")
    assert "ExcNodeList=n2" in cluster.call("scontrol", "show", "job", successor).stdout
    wait_for(run, lambda: "attempt 2" in log(run), 60, "the second attempt")
    opd(cluster, "cancel", str(run.root))
    wait_over(cluster, run)
