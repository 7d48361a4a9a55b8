"""What `opd validate` refuses of a loss before anything starts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.rules import problems
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, DataError, OpdError
from opd_megatron.launch.preflight import check_inputs, check_learner


@pytest.fixture(scope="module")
def demo() -> Recipe:
    return load_recipe("demo")[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.estimator=k3_differentiated"], "descends KL(q || pi)"),
        (["rollout.temperature=0.7"], "rollout.temperature=0.7"),
        (["objective.estimator=support_matching", "objective.support=full"], "no list of tokens"),
        (
            [
                *("teachers.main.engine=in_process", "objective.estimator=support_matching"),
                *("objective.support=full", "learner.loss_mode=recompute"),
            ],
            "learner.loss_mode='recompute'",
        ),
        (
            [
                *("teachers.main.engine=in_process", "objective.estimator=support_matching"),
                *("objective.support=union", "learner.loss_mode=chunked"),
            ],
            "learner.loss_mode='chunked'",
        ),
        (["objective.discount=1"], "correction.level"),
        (["filter.score=kl", "filter.low=70"], "chooses by the very token"),
        (
            ["task.coefficient=1", "task.grader=exact_matc", "correction.level=sequence"],
            "did you mean 'exact_match'",
        ),
    ],
)
def test_a_loss_that_is_not_what_it_says_is_refused(
    demo: Recipe, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_inputs(apply_overrides(demo, overrides))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.estimator=support_matching", "objective.topk=8"],
        ["objective.estimator=k3_differentiated", "objective.allow_biased=true"],
        ["objective.discount=1", "correction.level=sequence"],
        *(
            [
                "teachers.main.engine=in_process",
                "objective.estimator=support_matching",
                f"objective.support={support}",
                "objective.topk=8",
            ]
            for support in ("full", "union", "student_topk", "symmetric_difference")
        ),
        ["filter.score=teacher_entropy", "filter.low=70", "objective.topk=8"],
        ["rollout.temperature=0.7", "objective.allow_biased=true"],
    ],
)
def test_what_is_exact_or_allowed_passes(demo: Recipe, overrides: list[str]) -> None:
    check_inputs(apply_overrides(demo, overrides))


def test_a_task_needs_an_answer_in_every_training_row(demo: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1:", "answer": "2"}, {"prompt": "1+2:"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train={path}", "task.coefficient=1", "correction.level=sequence"]
    with pytest.raises(OpdError, match=r"train.jsonl:2 has no 'answer'"):
        check_inputs(apply_overrides(demo, overrides))


def test_a_mixed_recipe_may_ask_only_for_what_both_kinds_of_teacher_know(demo: Recipe) -> None:
    settings = ["objective.estimator=support_matching", "objective.support=full"]
    inside = apply_overrides(demo, ["teachers.main.engine=in_process"])
    mixed = dataclasses.replace(inside, teachers=inside.teachers | {"other": demo.teachers["main"]})
    check_inputs(apply_overrides(inside, settings))
    with pytest.raises(ConfigError, match=r"set teachers\.other\.engine=in_process"):
        check_inputs(apply_overrides(mixed, settings))


def test_an_environment_needs_answers_and_its_grader(demo: Recipe, tmp_path: Path) -> None:
    turns = ["environment.name=try_again", "environment.max_turns=2"]
    turns += ["environment.max_observation_tokens=10"]
    check_inputs(apply_overrides(demo, turns))
    with pytest.raises(ConfigError, match=r"environment\.grader='exact'"):
        check_inputs(apply_overrides(demo, [*turns, "environment.grader=exact"]))
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": "40+85:", "answer": "125"}\n{"prompt": "1+1:"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2 has no 'answer'.*environment\.name=none"):
        check_inputs(apply_overrides(demo, [*turns, f"data.train={rows}"]))


def test_only_a_teacher_inside_the_learner_can_be_offloaded(demo: Recipe) -> None:
    offload = ["teachers.main.offload=true"]
    assert any(
        "teachers.main.offload=True" in line for line in problems(apply_overrides(demo, offload))
    )
    inside = apply_overrides(demo, [*offload, "teachers.main.engine=in_process"])
    assert problems(inside) == []


def test_a_teacher_inside_the_learner_must_fit_its_ranks(demo: Recipe, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(demo.teachers["main"].path, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"intermediate_size": 51}))
    overrides = [f"teachers.main.path={odd}", "teachers.main.engine=in_process"]
    with pytest.raises(ConfigError, match=r"must divide teachers\.main's intermediate_size = 51"):
        check_learner(apply_overrides(demo, overrides))
    (odd / "config.json").write_text(json.dumps(config | {"vocab_size": 48}))
    with pytest.raises(ConfigError, match="vocabulary of 48 rows is not the student's of 32"):
        check_learner(apply_overrides(demo, overrides))
