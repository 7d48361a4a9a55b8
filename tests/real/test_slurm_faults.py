"""What ends an attempt: dead and hung learners, bad nodes, being taken for dead, getting nowhere.

Dead servers and nodes are in test_slurm_long.py, a bad configuration in test_slurm_nemo.py.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster
from slurm_runs import (
    PATIENCE,
    hosts,
    learner_ranks,
    log,
    opd,
    submit,
    wait_done,
    wait_for,
    wait_over,
)
from whole_runs import check_commits, check_finished, rows

from opd_megatron.launch.slurm.begin import claim
from opd_megatron.launch.slurm.queue import jobs_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.mark.ci
def test_a_dead_learner_and_a_hung_one_end_their_attempts_and_the_job_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The teacher is inside the learner here."""
    settings = ["steps=12", "evaluation.every=0", "learner.hang_timeout_s=30"]
    run = submit(cluster, tmp_path, *settings, "teachers.main.engine=in_process")
    wait_for(run, lambda: check_commits(run) >= 1, 200, "the first commit")
    _, rank = learner_ranks(cluster, run)
    rank.kill()
    wait_for(run, lambda: "attempt 1 ended with code 75" in log(run), 60, "the end of the attempt")
    committed = check_commits(run)
    wait_for(run, lambda: check_commits(run) > committed, 200, "a commit of the second attempt")
    assert f"resumed from step_{committed:06d}" in log(run)
    # One rank alone: the other hangs in a collective with it.
    _, stopped = learner_ranks(cluster, run)
    stopped.suspend()
    wait_for(run, lambda: "attempt 2 ended with code 75" in log(run), 180, "the end of the second")
    assert "no rank has moved for 30 s" in log(run)
    said = (run.role_logs(2, "learner") / "agent-0.log").read_text()
    assert f"learner rank 1 (pid {stopped.pid}) was stopped" in said
    stacks = (run.role_logs(2, "learner") / "learner-0.log").read_text()
    assert "most recent call first" in stacks
    wait_done(cluster, run, 300)
    check_finished(run, 12)


@pytest.mark.ci
def test_bad_nodes_are_left_out_by_the_jobs_that_go_on(cluster: Cluster, tmp_path: Path) -> None:
    """On two nodes, both servers on the second. n2 does not see the run directory: nothing starts there. Then n3 fails
    the site's check.
    """
    # Without namespaces a node can not be kept from seeing a folder: then it is the check of n2 that fails.
    hides = cluster.own_names
    bad, excluded = (["n2", "n3"], "n[2-3]") if hides else (["n2"], "n2")
    check = f"cluster.node_check=test $SLURMD_NODENAME != {bad[-1]}"
    (tmp_path / "run").mkdir()
    with cluster.hidden_from("n2", tmp_path / "run") if hides else nullcontext():
        run = submit(cluster, tmp_path, "steps=2", "cluster.share_nodes=true", check)
        wait_for(run, lambda: len(jobs_of(run)) == 1 + len(bad), 180, "the last successor")
        assert set(run.slurm.bad_nodes.read_text().split()) == set(bad)
        last = jobs_of(run)[-1]
        wait_for(run, lambda: cluster.state(last) == "RUNNING", 60, "it to run")
        shown = cluster.call("scontrol", "show", "job", last).stdout
        assert f"ExcNodeList={excluded}" in shown
        wait_done(cluster, run, 300)
    assert ("left out from now on: n2" in log(run)) == hides
    assert run.attempts() == [1, 2], "nothing was begun without a node that does not start"
    places = hosts(run, 2)
    assert set(places) == {"learner-0", "rollout-0", "teacher-main-0"}
    assert places["rollout-0"] == places["teacher-main-0"]
    if cluster.own_names:
        assert places["rollout-0"] != places["learner-0"]
    assert not set(bad) & set(places.values())
    check_finished(run, 2)


@pytest.mark.ci
def test_a_node_on_which_a_step_hangs_is_left_out_in_time(cluster: Cluster, tmp_path: Path) -> None:
    """As when its container is never there. The job that goes on would train; the test ends it when it starts."""
    if not cluster.own_names:
        pytest.skip("A NODE CAN NOT BE MADE TO HANG HERE: it takes namespaces")
    within = 10 * PATIENCE
    with ExitStack() as hanging:
        with cluster.paused():
            run = submit(cluster, tmp_path, f"cluster.node_start_timeout_s={within}")
            (job,) = jobs_of(run)
            hanging.enter_context(cluster.hangs_on("n2", run.root, f"slurm/arrived/{job}/n2"))
            start = time.monotonic()
        wait_for(run, lambda: len(jobs_of(run)) == 2, 90, "the successor")
        assert time.monotonic() - start > within, "it failed at once, and hung nowhere"
        wait_for(run, lambda: cluster.state(job) == "FAILED", 60, "the first job to end")
    said, _, _ = log(run).partition("goes on without n2")
    assert said.count(f"every node is to start a step, within {within} s") == 1
    assert "nothing starts on n2, or" in said and "left out from now on: n2" in said
    assert "attempt 1" not in said, "nothing was begun"
    successor = jobs_of(run)[-1]
    shown = cluster.call("scontrol", "show", "job", successor).stdout
    assert "ExcNodeList=n2" in shown
    wait_for(run, lambda: "attempt 1\n" in log(run), 60, "the successor's attempt")
    opd(cluster, "cancel", str(run.root))
    wait_over(cluster, run)


@pytest.mark.ci
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


@pytest.mark.slow
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
