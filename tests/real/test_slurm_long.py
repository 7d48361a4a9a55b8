"""Jobs that take minutes: the whole demo, heterogeneous, pre-empted, with a hanging learner, getting nowhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster
from slurm_runs import log, opd, role_processes, submit, wait_done, wait_for, wait_over
from whole_runs import check_commits, check_finished, rows

from opd_megatron.launch.slurm.queue import jobs_of
from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_whole_demo_reaches_its_accuracy_and_the_next_job_of_a_chain_finds_it_done(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    where = (
        "--cluster",
        "cpu-test",
        "--run-dir",
        str(run.root),
        "--allow-dirty",
        "--via",
        "sbatch",
    )
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


def test_a_heterogeneous_job_reaches_its_end(cluster: Cluster, tmp_path: Path) -> None:
    run = submit(cluster, tmp_path, "steps=2", "cluster.placement=het")
    wait_done(cluster, run, 400)
    check_finished(run, 2)


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


def test_a_run_that_gets_nowhere_stops(cluster: Cluster, tmp_path: Path) -> None:
    """Ranks are killed as soon as they are up, again and again."""
    run = submit(cluster, tmp_path, "steps=500", "cluster.max_idle_attempts=2")
    for attempt in (1, 2):
        wait_for(run, lambda n=attempt: f"attempt {n}\n" in log(run), 120, f"attempt {attempt}")
        victims: list[psutil.Process] = wait_for(
            run,
            lambda: role_processes(cluster, run, "megatron.learner --run-yaml"),
            90,
            "the ranks",
        )
        time.sleep(1)
        for victim in victims:
            victim.kill()
        wait_for(run, lambda n=attempt: f"attempt {n} ended" in log(run), 90, "its end")
    wait_over(cluster, run, 120)
    assert "cluster.max_idle_attempts=2: so many attempts in a row made no new commit" in log(run)


def test_a_learner_that_hangs_leaves_its_stacks_and_is_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submit(cluster, tmp_path, "steps=500", "learner.step_timeout_s=15")
    wait_for(run, lambda: any(r["step"] > 0 for r in rows(run.metrics)), 200, "the first step")
    # One rank alone: the other hangs in a collective with it.
    ranks = role_processes(cluster, run, "megatron.learner --run-yaml")
    (stopped, *_) = [p for p in ranks if p.environ().get("RANK") == "1"]
    stopped.suspend()
    wait_for(run, lambda: "attempt 1 ended with code 75" in log(run), 120, "the end of the attempt")
    assert "learner: no answer to" in log(run)
    stacks = (run.role_logs(1, "learner") / "learner-0.log").read_text()
    assert "most recent call first" in stacks
    wait_for(run, lambda: "attempt 2\n" in log(run), 60, "the second attempt")
    opd(cluster, "cancel", str(run.root))
    wait_over(cluster, run)
