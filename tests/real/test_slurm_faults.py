"""What ends an attempt, or nearly: dead nodes and processes, hangs, bad nodes, bad configuration, being taken for dead.

Each is a job of its own on a real Slurm, so they are behind `make test-slow`.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster
from slurm_runs import (
    hosts,
    learner_ranks,
    log,
    opd,
    role_processes,
    submit,
    wait_done,
    wait_for,
    wait_over,
)
from whole_runs import ROOT, check_commits, check_finished, rows

from opd_megatron.launch.slurm.begin import claim
from opd_megatron.launch.slurm.queue import jobs_of

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_dead_node_requeues_the_job_on_others(cluster: Cluster, tmp_path: Path) -> None:
    run = submit(cluster, tmp_path, "steps=12", "evaluation.every=0")
    wait_for(run, lambda: check_commits(run) >= 1, 200, "the first commit")
    node = hosts(run, 1)["teacher-main-0"] if cluster.own_names else "n3"
    cluster.kill_node(node)
    try:
        wait_for(run, lambda: "restart 1" in log(run), 90, "the restart")
        wait_done(cluster, run, 300)
    finally:
        cluster.start_node(node)
    if cluster.own_names:
        assert node not in hosts(run, 2).values()
    assert "resumed from step_" in log(run)
    check_finished(run, 12)
    cluster.wait_idle()


def test_a_killed_server_is_started_again_in_its_place(cluster: Cluster, tmp_path: Path) -> None:
    run = submit(cluster, tmp_path, "steps=30", "evaluation.every=0")
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    for role, model in (("rollout", "demo/student"), ("teacher-main", "demo/teacher")):
        (server, *_) = [
            p
            for p in role_processes(cluster, run, "sglang_main")
            if any(word.endswith(model) for word in p.cmdline())
        ]
        server.kill()
        agent_log = run.role_logs(1, role) / "agent-0.log"
        line = f"{role}-0 ended with signal SIGKILL and is started again (1 of 3)"
        wait_for(run, lambda p=agent_log, x=line: x in p.read_text(), 60, f"{role} to come back")
    wait_done(cluster, run, 300)
    assert json.loads(run.summary.read_text())["attempts"] == 1
    check_finished(run, 30)


def test_a_dead_learner_ends_the_attempt_and_the_job_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submit(cluster, tmp_path, "steps=6", "evaluation.every=0")
    wait_for(run, lambda: check_commits(run) >= 1, 200, "the first commit")
    _, rank = learner_ranks(cluster, run)
    rank.kill()
    wait_for(run, lambda: "attempt 1 ended with code 75" in log(run), 60, "the end of the attempt")
    wait_done(cluster, run, 300)
    assert "resumed from step_" in log(run)
    check_finished(run, 6)


def test_a_learner_that_hangs_leaves_its_stacks_and_is_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submit(cluster, tmp_path, "steps=500", "learner.hang_timeout_s=15")
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    # One rank alone: the other hangs in a collective with it.
    _, stopped = learner_ranks(cluster, run)
    stopped.suspend()
    wait_for(run, lambda: "attempt 1 ended with code 75" in log(run), 120, "the end of the attempt")
    assert "no rank has moved for 15 s" in log(run)
    said = (run.role_logs(1, "learner") / "agent-0.log").read_text()
    assert f"learner rank 1 (pid {stopped.pid}) was stopped" in said
    stacks = (run.role_logs(1, "learner") / "learner-0.log").read_text()
    assert "most recent call first" in stacks
    wait_for(run, lambda: "attempt 2\n" in log(run), 60, "the second attempt")
    opd(cluster, "cancel", str(run.root))
    wait_over(cluster, run)


def test_what_must_change_first_ends_the_job_without_a_requeue(
    cluster: Cluster, tmp_path: Path
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


def test_a_bad_node_is_left_out_by_the_job_that_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    run = submit(cluster, tmp_path, "steps=2", "cluster.node_check=test $SLURMD_NODENAME != n2")
    wait_for(run, lambda: len(jobs_of(run)) == 2, 90, "the successor")
    assert run.slurm.bad_nodes.read_text().split() == ["n2"]
    successor = jobs_of(run)[1]
    wait_for(run, lambda: cluster.state(successor) == "RUNNING", 60, "the successor to run")
    assert "ExcNodeList=n2" in cluster.call("scontrol", "show", "job", successor).stdout
    wait_done(cluster, run, 300)
    assert "n2" not in hosts(run, 2).values()
    check_finished(run, 2)


def test_an_attempt_that_was_taken_for_dead_writes_nothing_more(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The later attempt begins as on another node while the first still trains."""
    run = submit(cluster, tmp_path, "steps=500", "evaluation.every=0")
    wait_for(run, lambda: check_commits(run) >= 1, 200, "the first commit")
    (job,) = jobs_of(run)
    claim(run, "999999")
    wait_over(cluster, run, 60)
    assert "attempt 1: a later attempt of this run has begun" in log(run)
    step = check_commits(run)
    assert "ExitCode=78:0" in cluster.call("scontrol", "show", "job", job).stdout
    assert len(rows(run.ledger)) <= step + 1


def test_a_run_that_gets_nowhere_stops(cluster: Cluster, tmp_path: Path) -> None:
    """Ranks are killed as soon as they are up, again and again."""
    run = submit(cluster, tmp_path, "steps=500", "cluster.max_idle_attempts=2")
    for attempt in (1, 2):
        wait_for(run, lambda n=attempt: f"attempt {n}\n" in log(run), 120, f"attempt {attempt}")
        victims: list[psutil.Process] = wait_for(
            run,
            lambda: learner_ranks(cluster, run),
            90,
            "the ranks",
        )
        time.sleep(1)
        for victim in victims:
            victim.kill()
        wait_for(run, lambda n=attempt: f"attempt {n} ended" in log(run), 90, "its end")
    wait_over(cluster, run, 120)
    assert "cluster.max_idle_attempts=2: so many attempts in a row made no new commit" in log(run)
