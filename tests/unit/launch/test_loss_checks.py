"""What `opd validate` refuses of a loss before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError, OpdError
from opd_megatron.launch.preflight import check_inputs


@pytest.fixture(scope="module")
def demo() -> Recipe:
    return load_recipe("demo")[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.estimator=k3_differentiated"], "descends KL(q || pi)"),
        (["rollout.temperature=0.7"], "rollout.temperature=0.7"),
        (["objective.estimator=support_matching", "objective.support=full"], "does not score"),
        (["objective.discount=1"], "correction.level"),
        (["filter.score=kl", "filter.low=70"], "chooses by the very token"),
        (["task.coefficient=1", "task.grader=exact_matc"], "did you mean 'exact_match'"),
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
        ["filter.score=teacher_entropy", "filter.low=70"],
        ["rollout.temperature=0.7", "objective.allow_biased=true"],
    ],
)
def test_what_is_exact_or_allowed_passes(demo: Recipe, overrides: list[str]) -> None:
    check_inputs(apply_overrides(demo, overrides))


def test_a_task_needs_an_answer_in_every_training_row(demo: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1:", "answer": "2"}, {"prompt": "1+2:"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train={path}", "task.coefficient=1"]
    with pytest.raises(OpdError, match=r"train.jsonl:2 has no 'answer'"):
        check_inputs(apply_overrides(demo, overrides))
