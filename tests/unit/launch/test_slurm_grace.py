"""Notice and commit: what is predicted, what was measured, and notices that no site can give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.controller.grace import GraceWatch
from opd_megatron.errors import ConfigError
from opd_megatron.launch.slurm import grace
from opd_megatron.launch.slurm.site import limit_s, load_site
from opd_megatron.megatron.known_models import PUBLISHED
from opd_megatron.rundir import RunDir

LARGE = "qwen3_8b_base_from_qwen3_32b_32gpu_h100_bf16"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("04:00:00", 4 * 3600),
        ("2-12", 60 * 3600),
        ("1-00:30", 86400 + 1800),
        ("1-02:03:04", 86400 + 2 * 3600 + 3 * 60 + 4),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert limit_s(load_site("generic", [f"cluster.time={text}"])) == seconds


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.grace_s=600", "cluster.time=10"], "told to end as soon as it begins"),
        (["cluster.grace_s=65536", "cluster.time=2-00"], "Slurm takes 65535 at most"),
    ],
)
def test_a_notice_that_can_not_be_given_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_site("generic", overrides)


def test_a_commit_is_weights_master_copy_and_two_moments() -> None:
    recipe, _ = resolve_recipe(LARGE, [])
    assert grace.commit_bytes(recipe) == 14 * PUBLISHED["Qwen3-8B"][1]


@pytest.mark.parametrize(("notice", "warns"), [(60, True), (3600, False)])
def test_a_commit_that_does_not_fit_is_said_before_the_job_is_submitted(
    notice: int, warns: bool
) -> None:
    recipe, _ = resolve_recipe(LARGE, [])
    line = grace.predicted(recipe, load_site("h100", [f"cluster.grace_s={notice}"]))
    assert line.startswith("warning: ") == warns
    assert f"cluster.grace_s={notice}" in line and "115 GB" in line


def test_a_site_without_notice_says_what_that_costs() -> None:
    recipe, _ = resolve_recipe("demo", [])
    line = grace.predicted(recipe, load_site("cpu-test", ["cluster.grace_s=0"]))
    assert "costs the steps since the last commit" in line


def test_the_newest_measured_commit_is_compared(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert grace.measured(run, 30) is None
    rows = [{"step": 1, "perf/commit_s": 99.0}, {"step": 2}, {"step": 3, "perf/commit_s": 40.0}]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fits, short = grace.measured(run, 50), grace.measured(run, 40)
    assert fits == "the newest commit took 40.0 s, cluster.grace_s=50"
    assert short is not None and short.startswith("warning: ") and "--signal=B:USR1@40" in short


STEP = {"perf/learner_s": 20.0, "perf/publish_s": 5.0, "perf/sync_s": 5.0, "perf/rollout_s": 500.0}


@pytest.mark.parametrize(
    ("grace_s", "warns"), [(None, False), (0, False), (69.0, True), (71.0, False)]
)
def test_a_running_attempt_counts_commit_step_and_evaluation(
    grace_s: float | None, warns: bool
) -> None:
    """30 s of commit, 30 s to the end of a step (its rollouts are dropped), 10 s of evaluation."""
    said: list[str] = []
    GraceWatch(grace_s, said.append).committed(30.0, STEP, 10.0)
    assert len(said) == warns
    if warns:
        assert "cluster.grace_s=105 would do" in said[0]


def test_it_is_said_once_until_a_commit_fits_again() -> None:
    said: list[str] = []
    watch = GraceWatch(60.0, said.append)
    for commit_s in (40.0, 50.0, 10.0, 45.0):
        watch.committed(commit_s, STEP, 0.0)
    assert len(said) == 2
