"""Write what the recipes resolve to, and the table of docs/recipes.md: `make golden`. Reviewers read the diff.

    tests/golden/recipes/defaults.yaml   every default of the schema, of a teacher as teachers.NAME
    tests/golden/recipes/NAME.yaml       the keys of a recipe that differ from them

The two together are the resolved recipe. A new key with a default so changes one file, not every recipe's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from opd_megatron.config.overrides import changed_leaves, to_mapping
from opd_megatron.config.recipe_facts import facts_of
from opd_megatron.config.recipes import find_recipes, load_recipe
from opd_megatron.config.schema import Recipe, TeacherConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
_BEGIN, _END = "<!-- recipes begin -->\n", "<!-- recipes end -->"


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


def page() -> str:
    """docs/recipes.md with the table as it is now."""
    head, _, rest = PAGE.read_text().partition(_BEGIN)
    return head + _BEGIN + table() + _END + rest.partition(_END)[2]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for name, text in golden_files().items():
        (FOLDER / name).write_text(text)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
