"""A recipe resolves, an override changes just what it names, and every mistake says key, value, rule and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.config.overrides import apply_overrides, changed_leaves, leaves
from opd_megatron.config.recipes import find_recipes, load_recipe, resolve_recipe
from opd_megatron.config.rules import check, problems
from opd_megatron.config.run_yaml import read_run_yaml, write_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError


@pytest.fixture
def demo() -> Recipe:
    return load_recipe("demo")[0]


def test_an_override_changes_only_the_leaf_it_names(demo: Recipe) -> None:
    changed = apply_overrides(demo, ["optimizer.lr=3e-4", "teachers.main.server.num_servers=2"])
    assert changed_leaves(demo, changed) == {
        "optimizer.lr": (1e-3, 3e-4),
        "teachers.main.server.num_servers": (1, 2),
    }


def test_a_new_teacher_can_be_named(demo: Recipe) -> None:
    changed = apply_overrides(demo, ["teachers.math.path=/models/math"])
    assert set(changed.teachers) == {"main", "math"}
    assert changed.teachers["math"].path == "/models/math"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.tensor_paralel=1", ["learner.tensor_paralel", "did you mean 'tensor_parallel'"]),
        ("optimizr.lr=1", ["at the top level", "did you mean 'optimizer'"]),
        ("learner.tensor_parallel=two", ["learner.tensor_parallel='two'", "must be int"]),
        ("teachers.main.pth=x", ["did you mean 'path'"]),
        ("learner=3", ["is a section"]),
        ("seed.x=3", ["'seed' is a value"]),
        ("seed", ["key=value"]),
    ],
)
def test_a_mistyped_override_is_explained(demo: Recipe, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        apply_overrides(demo, [override])
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["correction.kind=mask"], "did you mean 'masked'"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be finite"),
        (["steps=0"], "steps=0: must be at least 1"),
        (["rollout.max_new_tokens=100"], "lower rollout.max_new_tokens to 51"),
        (["batch.tokens_per_microbatch=16"], "raise it to at least 32"),
        (["learner.sequence_parallel=true", "learner.tensor_parallel=1"], "sequence_parallel"),
        (["learner.data_parallel=300"], "more ranks than the 256 samples"),
        (["correction.low=1.5"], "must contain 1"),
        (["max_staleness=1"], "set max_staleness=0, or overlap.mode to one_step_off or async"),
        (["overlap.mode=one_step_off"], "set max_staleness=1"),
        (["overlap.mode=one_step_off", "max_staleness=2"], "set max_staleness=1"),
        (["overlap.mode=async"], "set max_staleness to 1 or more"),
        (["overlap.mode=asinc"], "did you mean 'async'"),
        (["overlap.partial_rollouts=false"], "or set overlap.mode=async"),
        (
            ["overlap.mode=async", "max_staleness=2", "correction.kind=none"],
            "set correction.kind=masked or truncated",
        ),
        (["rollout.top_p=0.9"], "kept only for a finite top_k"),
        (["rollout.min_p=0.1", "rollout.top_k=5000"], "at most 4000"),
        (["rollout.top_k=1"], "rollout.top_k=1: must be -1"),
        (["evaluation.top_k=0"], "greedy evaluation is evaluation.temperature=0"),
        (["checkpoint.keep=1"], "must be at least 2"),
        (["teachers.main.path=''"], "teachers.main.path=''"),
        (["learner.overlap_param_gather=true"], "set learner.distributed_optimizer=true or"),
        (["weight_sync.route=disc"], "did you mean 'disk'"),
        (["weight_sync.route=broadcast", "weight_sync.timeout_s=901"], "lower it to 900 or raise"),
    ],
)
def test_a_broken_rule_is_named_with_its_fix(demo: Recipe, overrides: list[str], word: str) -> None:
    found = problems(apply_overrides(demo, overrides))
    assert any(word in problem for problem in found), found


def test_all_problems_are_reported_at_once(demo: Recipe) -> None:
    with pytest.raises(ConfigError) as raised:
        check(apply_overrides(demo, ["steps=0", "max_staleness=2", "optimizer.lr=-1"]))
    assert len(str(raised.value).splitlines()) == 3


def test_an_unknown_recipe_suggests_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_recipe("dmeo")


def test_a_recipe_file_that_does_not_define_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="def recipe"):
        load_recipe(str(path))


def test_relative_paths_are_taken_from_the_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "mine.py"
    path.write_text(
        "from opd_megatron.config.schema import Recipe, StudentConfig\n"
        "def recipe():\n    return Recipe(student=StudentConfig(path='model'))\n"
    )
    assert load_recipe(str(path))[0].student.path == str(tmp_path / "model")


def test_paths_in_overrides_are_taken_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.jsonl").touch()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe, _ = resolve_recipe("demo", ["data.train=mine.jsonl", "student.path=demo"])
    assert recipe.data.train == str(tmp_path / "mine.jsonl")
    assert recipe.student.path == str(tmp_path / "demo")
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe, _ = resolve_recipe("demo", ["data.train=~/mine.jsonl", "student.path=nowhere"])
    assert recipe.data.train == str(tmp_path / "mine.jsonl")
    assert recipe.student.path == "nowhere"  # an error shows what was typed


def test_an_empty_override_of_text_is_the_empty_string(demo: Recipe) -> None:
    assert apply_overrides(demo, ["data.heldout="]).data.heldout == ""


def test_an_installed_package_never_takes_recipes_that_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "opd_megatron"
    for folder in (package / "_recipes", package.parent / "recipes"):
        folder.mkdir(parents=True)
        (folder / "demo.py").touch()
    (package.parent / "recipes" / "foreign.py").touch()
    monkeypatch.setattr("opd_megatron.config.recipes._PACKAGE", package)
    assert find_recipes() == {"demo": package / "_recipes" / "demo.py"}


def test_run_yaml_gives_back_the_same_recipe(demo: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    write_run_yaml(path, demo, Path("demo.py"), ["seed=3"])
    assert read_run_yaml(path) == demo


def test_run_yaml_with_a_key_of_another_version_is_refused(demo: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    write_run_yaml(path, demo, Path("demo.py"), [])
    path.write_text(path.read_text().replace("  seed:", "  sead:"))
    with pytest.raises(ConfigError, match="sead"):
        read_run_yaml(path)


def test_leaves_cover_every_field(demo: Recipe) -> None:
    flat = leaves(demo)
    assert flat["batch.prompts_per_step"] == 64
    assert flat["teachers.main.server.context_length"] == 64
