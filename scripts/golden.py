"""Write what the recipes resolve to, and what they say of it: `make golden`. Reviewers read the diff.

    tests/golden/recipes/defaults.yaml   every default of the schema, of a teacher as teachers.NAME
    tests/golden/recipes/NAME.yaml       the keys of a recipe that differ from them
    recipes/NAME.py                      the lines "Memory:" and "Speed:" of a recipe for GPUs, from the planner
    docs/recipes.md                      the tables

The first two together are the resolved recipe. A new key with a default so changes one file, not every recipe's.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from opd_megatron.config.overrides import changed_leaves, to_mapping
from opd_megatron.config.recipe_facts import facts_of
from opd_megatron.config.recipes import about_recipe, find_recipes, load_recipe
from opd_megatron.config.schema import Recipe, TeacherConfig
from opd_megatron.launch.planner.hardware import DEVICES
from opd_megatron.launch.planner.memory import GIB
from opd_megatron.launch.planner.plan import DEFAULT_PROMPT_TOKENS, make_plan
from opd_megatron.launch.planner.stages import Lengths

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"


def _relative(value: object) -> object:
    """Paths into the project, as the recipe file writes them."""
    folder = f"{ROOT / 'recipes'}/"
    return value.removeprefix(folder) if isinstance(value, str) else value


def golden_files() -> dict[str, str]:
    """Text of every golden file by its name."""
    defaults = Recipe(teachers={"NAME": TeacherConfig()})
    text = yaml.safe_dump(to_mapping(defaults), sort_keys=False, allow_unicode=True)
    files = {"defaults.yaml": text}
    for name, path in find_recipes().items():
        recipe = load_recipe(str(path))[0]
        changed = changed_leaves(
            Recipe(teachers=dict.fromkeys(recipe.teachers, TeacherConfig())), recipe
        )
        values = {key: _relative(value) for key, (_, value) in changed.items()}
        files[f"{name}.yaml"] = yaml.safe_dump(
            values, sort_keys=False, allow_unicode=True, width=120
        )
    return files


def planned(recipe: Recipe) -> dict[str, str]:
    """What the docstring of a recipe for GPUs says of memory and speed: nobody ran it, the planner expects it."""
    device = DEVICES[facts_of(recipe).hardware]
    plan = make_plan(recipe, device, Lengths(DEFAULT_PROMPT_TOKENS, recipe.max_response_tokens))
    sizes: dict[str, float] = {}
    for role in plan.memory:
        kind = "teachers" if role.role.startswith("teacher-") else role.role
        sizes[kind] = max(sizes.get(kind, 0.0), role.total / GIB)
    time = plan.time
    seconds = {"rollout": time.rollout, "teachers": time.teacher_left, "learner": time.learner}
    seconds["rest"] = time.step - sum(seconds.values())
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value)
    gib = ", ".join(f"{name} {value:.0f}" for name, value in sizes.items())
    return {
        "Memory": f"not run here; planned GiB of a GPU's {device.memory / GIB:.0f}: {gib}.",
        "Speed": f"not run here; planned {time.step:,.0f} s a step ({stages}), "
        f"{plan.gpu_hours(plan.steps):,.0f} GPU-hours.",
    }


def recipe_text(path: Path) -> str:
    """The file of a recipe with these lines as they are now.

    Raises:
        SystemExit: it lacks one of them.
    """
    text = path.read_text()
    recipe = load_recipe(str(path))[0]
    for head, value in planned(recipe).items() if recipe.device == "cuda" else ():
        line = f"{head}: {value}"
        text, found = re.subn(rf"^{head}: .*$", lambda _, line=line: line, text, flags=re.M)
        if found != 1:
            raise SystemExit(f"{path}: a docstring needs one line that begins with '{head}: '")
    return text


def table() -> str:
    """The recipes as a Markdown table."""
    lines = [
        "| recipe | devices | learner, rollout, teachers | precision | what |",
        "|" + " --- |" * 5,
    ]
    for path in find_recipes().values():
        facts = facts_of(load_recipe(str(path))[0])
        is_cpu = facts.hardware == "cpu"
        devices = "CPU" if is_cpu else f"{facts.num_gpus} x {facts.hardware.upper()}"
        teachers = [n for role, n in facts.gpus.items() if role.startswith("teacher-")]
        roles = [facts.gpus["learner"], facts.gpus.get("rollout", 0), *(teachers or [0])]
        split = "-" if is_cpu else " + ".join(map(str, roles))
        link = f"[{facts.name}](../recipes/{path.name})"
        lines.append(f"| {link} | {devices} | {split} | {facts.precision} | {facts.summary} |")
    return "\n".join(lines) + "\n"


def measured() -> str:
    """What the recipes for a CPU say that they reached and took, as a Markdown table."""
    heads = ("Expected", "Memory", "Speed")
    lines = ["| recipe | reached | memory | speed |", "|" + " --- |" * 4]
    for name, path in find_recipes().items():
        if load_recipe(str(path))[0].device == "cpu":
            said = dict(re.findall(r"^(\w+): (.*)\.$", about_recipe(path), re.M))
            lacks = [head for head in heads if head not in said]
            if lacks:
                raise SystemExit(f"{path}: {lacks[0]}: needs one line that ends with a full stop")
            # A bar would end a cell.
            said = {h: t.replace("||", "\u2016").replace("|", "/") for h, t in said.items()}
            cells = (said[head].partition(", measured once")[0] for head in heads)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/recipes.md with the tables as they are now."""
    text = PAGE.read_text()
    for mark, content in (("recipes", table()), ("measured", measured())):
        begin, end = f"<!-- {mark} begin -->\n", f"<!-- {mark} end -->"
        assert text.count(begin) == text.count(end) == 1, f"{PAGE}: {mark}"
        head, _, rest = text.partition(begin)
        text = head + begin + content + end + rest.partition(end)[2]
    return text


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for name, text in golden_files().items():
        (FOLDER / name).write_text(text)
    PAGE.write_text(page())
    for path in find_recipes().values():
        path.write_text(recipe_text(path))


if __name__ == "__main__":
    main()
