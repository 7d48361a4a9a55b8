"""Who teaches which prompt: by row, domain, schedule and draw; and the names that say so."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from opd_megatron.config.schema import Recipe, TeacherConfig, TeachingConfig
from opd_megatron.errors import ContractError
from opd_megatron.teacher.choice import soft_weights, target_of
from opd_megatron.teacher.target import Target, is_inside
from opd_megatron.types import Prompt

NAMES = ("weak", "middle", "good")


def recipe(**teaching: object) -> Recipe:
    return Recipe(
        steps=100,
        teachers={name: TeacherConfig(path=name) for name in NAMES},
        teaching=TeachingConfig(**teaching),  # type: ignore[arg-type]
    )


def prompt(teacher: str | None = None, domain: str | None = None) -> Prompt:
    return Prompt("p", (5,), "1+1:", None, teacher, "train.jsonl:1", domain=domain)


def taught(made: Recipe, position: int = 0, step: int = 0) -> str:
    return target_of(made, prompt(), position, step).name


@pytest.mark.parametrize(
    "target",
    [
        Target.one("a.b-c_d"),
        Target.of("arithmetic_mean", {"weak": 3.0, "good": 1.0}),
        Target.of("geometric_mean", {"a": 1 / 3, "b": 0.1, "c": math.pi}),
    ],
)
def test_a_target_is_its_name(target: Target) -> None:
    assert Target.parse(target.name) == target
    assert math.fsum(weight for _, weight in target.weights) == pytest.approx(1.0, abs=1e-12)


def test_members_without_weight_are_not_asked_and_one_alone_is_no_mean() -> None:
    assert Target.of("arithmetic_mean", {"weak": 0.0, "good": 2.0}) == Target.one("good")
    assert Target.of("geometric_mean", {"b": 1, "c": 0, "a": 1}).members == ("a", "b")


@pytest.mark.parametrize(
    "name",
    [
        "median(a=0.5,b=0.5)",
        "arithmetic_mean(a=1.0)",
        "arithmetic_mean(a=x,b=0.5)",
        "arithmetic_mean(a=0.50,b=0.5)",
        "arithmetic_mean(a=0.5,b=0.5",
        "arithmetic_mean()",
    ],
)
def test_what_is_no_name_of_a_target_is_refused(name: str) -> None:
    with pytest.raises(ContractError, match="not the name"):
        Target.parse(name)


def test_a_mean_is_inside_with_all_its_members_or_refused() -> None:
    mean = Target.of("arithmetic_mean", {"weak": 1, "good": 1}).name
    assert is_inside(mean, {"weak", "good", "middle"})
    assert not is_inside(mean, {"middle"})
    assert is_inside("weak", {"weak"})
    with pytest.raises(ContractError, match="some members are inside"):
        is_inside(mean, {"weak"})


@pytest.mark.parametrize(
    "kind", ["rows", "arithmetic_mean", "hard_switch", "soft_switch", "random"]
)
def test_a_row_keeps_the_teacher_that_it_names(kind: str) -> None:
    made = recipe(kind=kind, domains={"sums": "middle"})
    assert target_of(made, prompt(teacher="good"), 3, 50).name == "good"
    assert target_of(made, prompt(domain="sums"), 3, 50).name == "middle"
    assert target_of(made, prompt(teacher="good", domain="sums"), 3, 50).name == "good"
    unknown = target_of(made, prompt(domain="products"), 3, 50)
    assert unknown == target_of(made, prompt(), 3, 50)


def test_without_a_kind_rows_that_name_none_get_the_first_teacher() -> None:
    assert taught(recipe()) == "weak"


def test_a_hard_switch_hands_over_at_its_starts() -> None:
    made = recipe(kind="hard_switch", starts={"good": 0.5, "weak": 0.0, "middle": 0.25})
    seen = [taught(made, step=step) for step in range(100)]
    assert seen == ["weak"] * 25 + ["middle"] * 25 + ["good"] * 50
    assert taught(made, step=400) == "good"
    equal = [taught(recipe(kind="hard_switch"), step=step) for step in (0, 33, 34, 66, 67)]
    assert equal == ["weak", "weak", "middle", "middle", "good"]


def test_progress_is_over_its_own_number_of_steps() -> None:
    made = recipe(kind="hard_switch", over_steps=10)
    assert [taught(made, step=step) for step in (3, 4, 7)] == ["weak", "middle", "good"]


def test_a_soft_switch_asks_one_or_two_and_moves_linearly() -> None:
    starts = [("weak", 0.0), ("middle", 0.25), ("good", 0.75)]
    assert soft_weights(starts, 0.0) == {"weak": 1.0, "middle": 0.0}
    assert soft_weights(starts, 0.5) == pytest.approx({"middle": 0.5, "good": 0.5})
    assert soft_weights(starts, 0.65) == pytest.approx({"middle": 0.2, "good": 0.8})
    assert soft_weights(starts, 0.75) == {"good": 1.0}
    made = recipe(kind="soft_switch", mean="geometric_mean", starts=dict(starts))
    assert taught(made, step=0) == "weak"
    assert taught(made, step=25) == "middle"
    assert taught(made, step=50) == "geometric_mean(good=0.5,middle=0.5)"
    assert taught(made, step=80) == "good"


def test_means_are_of_the_named_members_with_their_weights() -> None:
    made = recipe(kind="arithmetic_mean", weights={"good": 3.0, "weak": 1.0})
    assert taught(made) == "arithmetic_mean(good=0.75,weak=0.25)"
    assert target_of(recipe(kind="geometric_mean"), prompt(), 0, 0).members == tuple(sorted(NAMES))


def test_draws_follow_the_weights_the_seed_and_the_position_alone() -> None:
    made = recipe(kind="random", weights={"weak": 1.0, "good": 3.0})
    seen = [taught(made, position) for position in range(4000)]
    counts = Counter(seen)
    assert set(counts) == {"weak", "good"}
    assert counts["good"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert [taught(made, position, step=70) for position in range(4000)] == seen
    assert [taught(replace(made, seed=1), position) for position in range(4000)] != seen
