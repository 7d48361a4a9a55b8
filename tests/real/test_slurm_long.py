"""Jobs of minutes: the whole demo through faults; heterogeneous and pre-empted; at the time limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import (
    check_whole,
    hosts,
    kill_server,
    last_step,
    log,
    opd,
    submit,
    wait_done,
    wait_for,
    wait_over,
    whole_demo,
)
from whole_runs import check_commits, check_finished

from opd_megatron.controller import commit
from opd_megatron.launch.slurm.queue import jobs_of
from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.mark.ci
@pytest.mark.timeout(2700)
def test_the_whole_demo_reaches_its_accuracy_though_servers_and_a_node_die(
    cluster: Cluster, tmp_path: Path
) -> None:
    """A second job waits for it and finds it done."""
    opd(cluster, *whole_demo(tmp_path, "sbatch", "checkpoint.every=5"))
    run = RunDir(tmp_path / "run")
    wait_for(run, lambda: last_step(run) >= 1, 200, "the first step")
    for role, model in (("rollout", "demo/student"), ("teacher-main", "demo/teacher")):
        kill_server(cluster, run, role, model)
    wait_for(run, lambda: commit.committed_steps(run.checkpoints), 300, "the first commit")
    node = hosts(run, 1)["teacher-main-0"] if cluster.own_names else "n3"
    cluster.kill_node(node)
    try:
        wait_for(run, lambda: "restart 1, nodes" in log(run), 90, "the restart")
        (job,) = jobs_of(run)
        chained = cluster.call(
            "sbatch", "--parsable", f"--dependency=afterany:{job}", str(run.slurm.script)
        ).stdout.strip()
        wait_done(cluster, run, 800)
    finally:
        cluster.start_node(node)
    if cluster.own_names:
        assert node not in hosts(run, 2).values()
    assert "resumed from step_" in log(run)
    check_whole(run, attempts=2)
    wait_for(run, lambda: cluster.state(chained) == "COMPLETED", 60, "the chained job")
    assert log(run).count("the run is done") == 2
    cluster.wait_idle()


@pytest.mark.ci
def test_a_heterogeneous_job_that_is_preempted_commits_and_goes_on_to_its_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    settings = ["steps=30", "checkpoint.every=100", "evaluation.every=0"]
    run = submit(cluster, tmp_path, *settings, "cluster.placement=het")
    wait_for(run, lambda: last_step(run) >= 1, 200, "the first step")
    (job,) = jobs_of(run)
    shown = cluster.call("scontrol", "-o", "show", "job", job).stdout.splitlines()
    assert len(shown) == 3, "learner with controller, rollout, teacher"
    assert all("TimeLimit=00:10:00" in line for line in shown)
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
    assert jobs_of(run) == [job]
    assert "restarts 1" in opd(cluster, "status", str(run.root))


@pytest.mark.slow
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
