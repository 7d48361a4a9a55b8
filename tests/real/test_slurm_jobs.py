"""Runs as jobs of a real Slurm: to the end through a requeue, and cancelled. Other ends: test_slurm_faults.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import (
    arguments_of,
    commands,
    hosts,
    log,
    opd,
    promised,
    submit,
    wait_done,
    wait_for,
    wait_over,
)
from whole_runs import check_commits, check_finished, rows

from opd_megatron.atomic import read_json
from opd_megatron.launch.members import scratch_folder
from opd_megatron.launch.slurm.queue import jobs_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]


def test_a_signal_commits_and_requeues_and_the_run_goes_on_to_its_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Four nodes: the learner on two of them. `checkpoint.every` never comes: the signal alone commits."""
    settings = [
        *("steps=6", "checkpoint.every=100", "evaluation.every=0"),
        "cluster.devices_per_node=1",
    ]
    wanted = promised(opd(cluster, *arguments_of(tmp_path, *settings), "--dry-run"))
    assert set(wanted) == {
        *("controller on node 0", "learner on node 0", "learner on node 1"),
        *("rollout-0 on node 2", "teacher-main-0 on node 3"),
    }
    run = submit(cluster, tmp_path, *settings)
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    running = commands(cluster, run)
    assert [name for name, command in wanted.items() if command not in running] == []
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


def test_cancel_leaves_nothing_and_a_living_run_refuses_a_second_job(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submit(cluster, tmp_path, "steps=500")
    wait_for(run, lambda: "attempt 1\n" in log(run), 60, "the first attempt")
    text = opd(cluster, "resume", str(run.root), code=78)
    assert "is RUNNING; wait for it, or opd cancel it" in text
    # Past `opd`, straight to Slurm.
    output = tmp_path / "second.log"
    second = cluster.call(
        *("sbatch", "--parsable", "--nodes=1", "--output", str(output), str(run.slurm.script))
    ).stdout.strip()
    wait_for(run, lambda: cluster.state(second) == "FAILED", 60, "the second job to be refused")
    assert "is alive in" in output.read_text()
    wait_for(run, lambda: len(hosts(run, 1)) == 3, 60, "every node to start its role")
    agents = [read_json(path)["agent"] for path in run.attempt(1).nodes.glob("*.json")]
    assert opd(cluster, "cancel", str(run.root)).startswith("cancelled ")
    wait_over(cluster, run)
    status = opd(cluster, "status", str(run.root))
    assert "CANCELLED" in status and "not done; go on with: opd resume" in status
    assert "attempt 1" in opd(cluster, "logs", "-f", str(run.root)), "it ends with the run"
    assert [agent for agent in agents if scratch_folder(agent).exists()] == []
    cluster.wait_idle()
