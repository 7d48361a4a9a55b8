"""The project's recipes: valid without their models, named after what they are, pinned by golden files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from opd_megatron.config.overrides import (
    apply_overrides,
    change,
    changed_leaves,
    from_mapping,
    leaf_type,
)
from opd_megatron.config.recipe_facts import facts_of, parse_name, precision_of, size_of, word_of
from opd_megatron.config.recipes import about_recipe, find_recipes, load_recipe
from opd_megatron.config.rules import check
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.offline import check_offline
from opd_megatron.observe.metric_table import METRICS

ROOT = Path(__file__).resolve().parents[3]
RECIPES = find_recipes()
LINES = range(25, 41)


def _golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_of_the_declared_types(name: str) -> None:
    recipe, _ = load_recipe(name)
    check(recipe)
    check_offline(recipe)
    assert apply_overrides(recipe, []) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_says_what_the_recipe_is(name: str) -> None:
    recipe, _ = load_recipe(name)
    parts = parse_name(name)
    if parts is None:
        assert name.startswith("demo") and recipe.device == "cpu"
        return
    teachers = [word_of(teacher.path) for teacher in recipe.teachers.values()]
    assert (parts.gpus, parts.precision) == (facts_of(recipe).num_gpus, precision_of(recipe))
    assert word_of(recipe.student.path) in (parts.student, f"{parts.student}_sft")
    assert (parts.teacher in teachers) if parts.teacher else not teachers
    assert recipe.device == "cuda"


@pytest.mark.parametrize("path", RECIPES.values(), ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_where_it_is_from(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) in LINES
    said = dict(re.findall(r"^(\w+): (.*)", about_recipe(path), re.M))
    heads = {"Source", "Expected", "Memory", "Speed", "Run"}
    if parse_name(path.stem):
        assert said.keys() >= {*heads, "Reproduces", "Prompts"}
        assert all(said[head].startswith("not run here") for head in ("Memory", "Speed"))
        assert said["Prompts"].split()[0] in load_recipe(str(path))[0].data.train
        assert f"opd submit {path.stem} --cluster" in said["Run"]
    else:
        assert said.keys() >= {*heads, "Shows"}
        assert all("measured once" in said[head] for head in ("Memory", "Speed"))
        assert f"opd run {path.stem}" in said["Run"]


@pytest.mark.parametrize("path", RECIPES.values(), ids=lambda path: path.stem)
def test_what_a_recipe_names_is_there(path: Path) -> None:
    about = about_recipe(path)
    names = {metric.name.removesuffix("/<teacher>") for metric in METRICS}
    teachers = {f"teacher/share/{teacher}" for teacher in load_recipe(str(path))[0].teachers}
    found = re.findall(r"\b(?:train|teacher|eval|rollout|offpolicy|task)/[\w/]*\w", about)
    assert set(found) <= names | teachers
    assert set(re.findall(r"^At scale: (.*)$", about, re.M)) <= RECIPES.keys()
    assert all((ROOT / page).is_file() for page in re.findall(r"docs/[\w/.-]+\.md", about))


@pytest.mark.parametrize("path", RECIPES.values(), ids=lambda path: path.stem)
def test_a_recipe_that_says_it_needs_allow_biased_does(path: Path) -> None:
    recipe, _ = load_recipe(str(path))
    assert ("needs `allow_biased`" in about_recipe(path)) == recipe.objective.allow_biased
    if recipe.objective.allow_biased:
        with pytest.raises(ConfigError, match="allow_biased"):
            check_offline(change(recipe, {"objective.allow_biased": False}))


def test_the_demo_shows_keys_of_its_family_and_changes_none() -> None:
    demo, other = load_recipe("demo")[0], load_recipe("demo_hellinger")[0]
    assert set(changed_leaves(demo, other)) == {"name", "summary", "objective.divergence"}


def test_golden_files_and_the_table_are_current() -> None:
    golden = _golden()
    on_disk = {path.name: path.read_text() for path in golden.FOLDER.iterdir()}
    assert on_disk == golden.golden_files(), "run `make golden` and read the diff"
    assert golden.PAGE.read_text() == golden.page(), "run `make golden`"
    for path in RECIPES.values():
        assert path.read_text() == golden.recipe_text(path), "run `make golden`"


@pytest.mark.parametrize("name", RECIPES)
def test_defaults_and_differences_are_the_whole_recipe(name: str) -> None:
    import yaml

    folder = _golden().FOLDER
    recipe = from_mapping(yaml.safe_load((folder / "defaults.yaml").read_text()), "defaults.yaml")
    differences = yaml.safe_load((folder / f"{name}.yaml").read_text())
    names = {key.split(".")[1] for key in differences if key.startswith("teachers.")}
    recipe = change(recipe, {"teachers": dict.fromkeys(names, recipe.teachers["NAME"])})
    aliases = {key: value for key, value in differences.items() if ".aliases." in key}
    plain = {key: value for key, value in differences.items() if key not in aliases}
    for key, value in aliases.items():
        teacher, _, token = key.partition(".aliases.")
        plain[f"{teacher}.aliases"] = {**plain.get(f"{teacher}.aliases", {}), token: value}
    kinds = {key: leaf_type(key) for key in plain}
    values = {k: float(v) if kinds[k] is float else v for k, v in plain.items()}
    rebuilt = change(recipe, values)
    loaded = load_recipe(name)[0]
    paths = {
        key: value for key, value in values.items() if key.endswith((".path", "train", "heldout"))
    }
    assert change(loaded, paths) == rebuilt


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learner.tensor_paralel": 2}, "did you mean 'tensor_parallel'"),
        ({"learner.tensor_parallel": 2.0}, "must be <class 'int'>"),
        ({"learner.recompute": 1}, "must be <class 'bool'>"),
        ({"steps": True}, "must be <class 'int'>"),
    ],
)
def test_a_wrong_difference_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        change(Recipe(), values)


def test_a_difference_changes_nothing_else_and_makes_new_teachers() -> None:
    before = Recipe()
    after = change(before, {"optimizer.lr": 1, "teachers.math.server.num_servers": 3})
    assert before == Recipe()
    assert after.optimizer.lr == 1 and after.teachers["math"].server.num_servers == 3
    assert change(after, {"teachers": {}, "optimizer.lr": before.optimizer.lr}) == before


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("Qwen/Qwen3-1.7B-Base", "1.7B"),
        ("open-thoughts/OpenThinker3-7B", "7B"),
        ("demo/student", ""),
    ],
)
def test_the_size_is_read_from_a_models_name(model: str, size: str) -> None:
    assert size_of(model) == size


def test_a_base_student_without_its_alias_is_refused_offline() -> None:
    recipe, _ = load_recipe("qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16")
    with pytest.raises(ConfigError, match=r"ends with <\|endoftext\|> and Qwen/Qwen3-4B with"):
        check_offline(change(recipe, {"teachers.main.aliases": {}}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"student.path": "Qwen/Qwen3-4B-Bse"}, "did you mean 'Qwen/Qwen3-4B-Base'"),
        ({"learner.tensor_parallel": 3}, "num_attention_heads = 32"),
        ({"rollout.max_new_tokens": 32768}, "its context of 32768 tokens is shorter"),
        ({"teachers.main.path": "Qwen/Qwen2.5-7B-Instruct"}, "152064 embedding rows"),
    ],
)
def test_what_can_be_seen_offline_is_refused_offline(values: dict[str, object], words: str) -> None:
    recipe, _ = load_recipe("qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16")
    with pytest.raises(ConfigError, match=words):
        check_offline(change(recipe, values))
