"""What `teaching` refuses: every mistake with key, value, rule and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.resume import refuse_other_run
from opd_megatron.config.rules import problems
from opd_megatron.config.run_yaml import read_run_yaml, write_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError


@pytest.fixture(scope="module")
def three() -> Recipe:
    demo = load_recipe("demo")[0]
    more = [f"teachers.{name}.path={demo.teachers['main'].path}" for name in ("weak", "good")]
    sizes = [f"teachers.{n}.server.max_total_tokens=16384" for n in ("weak", "good")]
    return apply_overrides(demo, more + sizes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["teaching.kind=arithmetic_mean"],
        ["teaching.kind=geometric_mean", "teaching.weights.weak=1", "teaching.weights.good=3"],
        ["teaching.kind=hard_switch", "teaching.starts.weak=0", "teaching.starts.main=0.5"],
        ["teaching.kind=soft_switch", "teaching.mean=geometric_mean", "teaching.over_steps=10"],
        ["teaching.kind=random", "teaching.weights.weak=0.5", "teaching.weights.main=0.5"],
        ["teaching.domains.sums=good", "evaluation.teacher=weak"],
        [
            "teaching.kind=control_token",
            *("teaching.control_texts.main=1", "teaching.control_texts.weak=2"),
            "teaching.control_texts.good=3",
        ],
    ],
)
def test_what_makes_sense_is_accepted(three: Recipe, overrides: list[str]) -> None:
    assert problems(apply_overrides(three, overrides)) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teaching.kind=arithmetic_maen"], "did you mean 'arithmetic_mean'"),
        (["teaching.kind=random", "teaching.weights.god=1"], "did you mean 'good'"),
        (["teaching.kind=hard_switch", "teaching.starts.strong=0"], "teaching.starts.strong"),
        (["teaching.domains.sums=god"], "teaching.domains.sums='god': no such teacher"),
        (["evaluation.teacher=god"], "evaluation.teacher='god': no such teacher"),
        (["teaching.weights.good=1"], "teaching.kind='rows' does not use it"),
        (["teaching.kind=random", "teaching.starts.good=0"], "does not use it"),
        (["teaching.kind=random", "teaching.over_steps=5"], "teaching.over_steps=5"),
        (
            ["teaching.kind=random", "teaching.weights.good=0", "teaching.weights.weak=1"],
            "must be above 0",
        ),
        (["teaching.kind=hard_switch", "teaching.starts.good=0.5"], "nobody teaches at progress 0"),
        (
            ["teaching.kind=hard_switch", "teaching.starts.good=0", "teaching.starts.weak=1"],
            "must lie in [0, 1)",
        ),
        (
            ["teaching.kind=soft_switch", "teaching.starts.good=0", "teaching.starts.weak=0"],
            "two begin at once",
        ),
        (["teaching.kind=geometric_mean", "teaching.weights.good=1"], "joins 2 to 8 teachers"),
        (
            ["teaching.kind=arithmetic_mean", "teachers.weak.engine=in_process"],
            "all served or all inside the learner",
        ),
        (["teaching.kind=control_token"], "teaching.control_texts.main"),
        (
            [
                *("teaching.kind=control_token", "teachers.weak.engine=in_process"),
                *(f"teaching.control_texts.{n}={n}" for n in ("main", "weak", "good")),
            ],
            "the control text too",
        ),
        (
            [
                "teaching.kind=control_token",
                *(f"teaching.control_texts.{n}=1" for n in ("main", "weak", "good")),
            ],
            "two members share one",
        ),
        (
            ["teaching.kind=random", "objective.estimator=cross_entropy"],
            "learns from given responses",
        ),
    ],
)
def test_a_mistake_is_named_with_its_fix(three: Recipe, overrides: list[str], words: str) -> None:
    found = problems(apply_overrides(three, overrides))
    assert any(words in problem for problem in found), found


def test_more_than_eight_members_are_refused(three: Recipe) -> None:
    path = three.teachers["main"].path
    many = [f"teachers.t{i}.path={path}" for i in range(6)]
    caches = [f"teachers.t{i}.server.max_total_tokens=16384" for i in range(6)]
    made = apply_overrides(three, [*many, *caches, "teaching.kind=random"])
    assert any("there are 9" in problem for problem in problems(made))


def test_a_schedule_survives_the_frozen_recipe(three: Recipe, tmp_path: Path) -> None:
    made = apply_overrides(
        three, ["teaching.kind=soft_switch", "teaching.starts.weak=0", "teaching.starts.good=0.25"]
    )
    write_run_yaml(tmp_path / "run.yaml", made, tmp_path / "demo.py", [])
    assert read_run_yaml(tmp_path / "run.yaml") == made


def test_a_resumed_run_keeps_the_steps_of_its_curriculum(three: Recipe) -> None:
    started = apply_overrides(three, ["teaching.kind=hard_switch", "steps=60"])
    with pytest.raises(ConfigError, match=r"add teaching\.over_steps=60"):
        refuse_other_run(started, apply_overrides(started, ["steps=90"]))
    refuse_other_run(started, apply_overrides(started, ["steps=90", "teaching.over_steps=60"]))
    with pytest.raises(ConfigError, match=r"teaching\.kind='random'"):
        refuse_other_run(started, apply_overrides(started, ["teaching.kind=random"]))
    refuse_other_run(three, apply_overrides(three, ["steps=90"]))
