"""What a supervised recipe may leave out, and what it may not say."""

from __future__ import annotations

import dataclasses

import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.rules import check, problems
from opd_megatron.config.schema import Recipe, ServerConfig, TeacherConfig
from opd_megatron.launch.ports import PortReservations
from opd_megatron.launch.preflight import check_inputs
from opd_megatron.launch.roles import place_servers


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("demo_sft")[0]


def test_it_needs_no_teacher_and_without_evaluation_no_server(recipe: Recipe) -> None:
    assert recipe.teachers == {}
    # The defaults of a server are refused on a CPU; here none is started.
    alone = dataclasses.replace(
        apply_overrides(recipe, ["data.heldout="]),
        rollout=dataclasses.replace(recipe.rollout, server=ServerConfig()),
    )
    check(alone)
    check_inputs(alone)
    with PortReservations() as ports:
        assert place_servers(alone, ports) == {"rollout": []}
        assert [len(servers) for servers in place_servers(recipe, ports).values()] == [1]


def test_a_teacher_may_serve_its_evaluation(recipe: Recipe) -> None:
    demo = load_recipe("demo")[0]
    both = dataclasses.replace(recipe, teachers=demo.teachers)
    check(both)
    check_inputs(both)
    with PortReservations() as ports:
        assert set(place_servers(both, ports)) == {"rollout", "teacher-main"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batch.rollouts_per_prompt=4"], "set batch.rollouts_per_prompt=1"),
        (["rollout.temperature=0.7"], "set rollout.temperature=1.0"),
        (["max_staleness=1"], "set max_staleness=0"),
        (["overlap.mode=async", "max_staleness=1"], "set overlap.mode=sync"),
    ],
)
def test_settings_of_rollouts_are_refused_with_the_fix(
    recipe: Recipe, overrides: list[str], words: str
) -> None:
    (problem,) = problems(apply_overrides(recipe, overrides))
    assert overrides[0].split("=")[0] in problem and words in problem


def test_a_teacher_that_nothing_asks_is_refused(recipe: Recipe) -> None:
    useless = dataclasses.replace(
        apply_overrides(recipe, ["data.heldout="]), teachers={"main": TeacherConfig(path="x")}
    )
    (problem,) = problems(useless)
    assert problem.startswith("teachers=['main']:") and "set data.heldout=FILE" in problem
