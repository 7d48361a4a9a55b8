"""report.html for whole, short, damaged and empty runs."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_megatron.observe.coloring import ColoredRollout
from opd_megatron.observe.panels import SECTIONS
from opd_megatron.observe.report import (
    choose_rollouts,
    counted,
    is_finished,
    recipe_difference,
    render_report,
)
from opd_megatron.observe.run_files import load_run
from opd_megatron.observe.stages import account_time

WriteRun = Callable[..., Path]
NUM_PANELS = sum(len(section.panels) for section in SECTIONS)
NUM_OPTIONAL = sum(len(section.panels) for section in SECTIONS if section.optional)


class Outline(html.parser.HTMLParser):
    """Counts tags and collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")


def outline(page: Path) -> Outline:
    parser = Outline()
    parser.feed(page.read_text())
    return parser


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    return render_report(write_run(tmp_path_factory.mktemp("whole") / "run"))


def test_the_page_is_self_contained_and_has_no_script(whole: Path) -> None:
    found = outline(whole)
    assert found.loads == []
    assert not {"script", "link", "img", "iframe"} & found.tags.keys()
    assert "@import" not in whole.read_text() and "url(http" not in whole.read_text()


def test_a_whole_run_shows_every_picture_and_ten_rollouts(whole: Path) -> None:
    text = whole.read_text()
    found = outline(whole)
    assert found.tags["svg"] == NUM_PANELS + 1
    assert text.count('<div class="rollout">') == 10
    assert "Early in the run" in text and "At the end" in text
    assert "not recorded" not in text


def test_the_headline_is_that_of_the_summary(whole: Path) -> None:
    text = re.sub(r"<[^>]+>|\s+", " ", whole.read_text())
    text = re.sub(r"\s+", " ", text)
    assert "Held-out accuracy 35.0% &rarr; 90.0% teacher 96.6%" in text
    assert "0.620 &rarr; 0.080 nats/token, 7.7 times smaller" in text
    assert "finished, 80 steps" in text and "restarted before step 41" in text


def test_series_of_teachers_are_curves_with_their_names_and_rows_of_the_table(whole: Path) -> None:
    text = whole.read_text()
    assert text.count(">weak</tspan>") + text.count(">weak</text>") >= 3
    assert "eval/heldout/kl_reverse_to/good" in text and "<teacher>" not in text


def test_every_picture_marks_the_restart(whole: Path) -> None:
    assert whole.read_text().count(">restart</text>") == NUM_PANELS + 1


def test_the_data_account_and_the_recipe_are_shown(whole: Path) -> None:
    text = whole.read_text()
    assert "3: broken json 2, over long 1" in text
    assert "train.jsonl:7: broken_json: Expecting" in text
    assert '<td class="key">teachers.main.path</td><td>demo/teacher</td>' in text
    assert "packages.megatron-core" in text and "run.yaml, everything resolved" in text


def test_a_run_that_died_at_step_three_has_a_page(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", last_step=3, restart_at=None)
    (folder / "environment.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "att')
    text = render_report(folder).read_text()
    assert "not finished: step 3 of 80 is the last one recorded" in text
    assert text.count("<svg") == NUM_PANELS + 1
    assert ">35.0%" in text.replace("\n", "") and "not recorded" in text
    assert "no restart" in text


def test_a_finished_run_that_is_resumed_for_more_steps_is_not_finished(
    tmp_path: Path, write_run: WriteRun
) -> None:
    folder = write_run(tmp_path / "run", steps=2, restart_at=None)
    assert is_finished(load_run(folder))
    run_yaml = folder / "run.yaml"
    run_yaml.write_text(run_yaml.read_text().replace("steps: 2\n", "steps: 3\n"))
    assert not is_finished(load_run(folder))
    assert "not finished: step 2 of 3" in render_report(folder).read_text()


def test_the_settings_of_training_and_evaluation_are_said(whole: Path) -> None:
    text = whole.read_text()
    assert "reverse_kl by policy_gradient, discount 0, masked importance weights" in text
    assert "x 8 samples, temperature 1, at most 1024 new tokens, grader exact_match" in text
    assert "exact over the vocabulary" in text


def test_a_run_of_another_version_has_a_page(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", steps=2, restart_at=None)
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace("estimator:", "how:"))
    assert "finished, 2 steps" in render_report(folder).read_text()


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    text = render_report(tmp_path).read_text()
    assert "no step recorded" in text and "<svg" not in text
    assert text.count("not recorded") > NUM_PANELS - NUM_OPTIONAL
    assert "What is trained on?" not in text


FILES = [
    *("run.yaml", "inputs.json", "summary.json", "environment.json"),
    *("metrics.jsonl", "rollouts.jsonl"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["[1, 2]\n{}\n", '{"step": 1}\n{"step": 2\n{}\n', "\xff"])
def test_a_damaged_file_is_named_and_the_others_are_read(
    tmp_path: Path, write_run: WriteRun, name: str, content: str
) -> None:
    folder = write_run(tmp_path / "run", steps=2, restart_at=None)
    (folder / name).write_text(content + "\n", encoding="latin-1")
    run = load_run(folder)
    assert run.problems and all(f"{name} can not be read" in problem for problem in run.problems)
    read = [run.recipe, run.inputs, run.summary, run.environment, run.rows, run.rollouts]
    assert [bool(found) for found in read] == [file != name for file in FILES]


def test_a_run_with_only_damaged_files_has_a_page(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text("[1, 2]\n{}\n")
    text = render_report(tmp_path).read_text()
    assert all(f"{name} can not be read" in text for name in FILES)


def test_what_a_model_or_a_recipe_says_is_escaped(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", steps=2, restart_at=None)
    hostile = "<script>alert(1)</script>"
    record = ColoredRollout(1, hostile, hostile, (hostile,), (0.0,), (1.0,), None, "stop")
    (folder / "rollouts.jsonl").write_text(json.dumps(record.to_record()) + "\n")
    (folder / "run.yaml").write_text(f"overrides: ['{hostile}']\nrecipe: {{name: '{hostile}'}}\n")
    assert "script" not in outline(render_report(folder)).tags


def test_a_long_run_makes_a_page_of_reasonable_size(tmp_path: Path, write_run: WriteRun) -> None:
    page = render_report(write_run(tmp_path / "run", steps=300))
    assert page.stat().st_size < 2_000_000


def rollout_at(step: int, prompt: str) -> ColoredRollout:
    return ColoredRollout(step, f"{prompt}#{step}", prompt, (), (), (), None, "stop")


def test_rollouts_are_chosen_from_both_ends_with_different_prompts() -> None:
    rollouts = [rollout_at(step, f"p{i // 2}") for step in (1, 20, 40, 60, 80) for i in range(8)]
    (_, early), (_, late) = choose_rollouts(rollouts, 8)
    assert [r.step for r in early] == [1] * 4 and [r.step for r in late] == [80] * 4
    assert {r.prompt for r in early} == {r.prompt for r in late} == {"p0", "p1", "p2", "p3"}


def test_recipe_difference_knows_the_teacher_defaults() -> None:
    recipe = {"steps": 100, "seed": 3, "teachers": {"main": {"path": "t", "server": {}}}}
    assert recipe_difference(recipe) == [
        ("seed", 3, 0),
        ("teachers.main.path", "t", ""),
        ("teachers.main.server", {}, None),
    ]


def test_time_account_adds_up() -> None:
    rows = [
        {"step": 0, "perf/eval_s": 5.0},
        {"step": 1, "perf/step_s": 2.0, "perf/rollout_s": 1.0, "perf/learner_s": 0.5},
        {"step": 2, "perf/step_s": 4.0, "perf/rollout_s": 2.0, "perf/learner_s": 1.0},
    ]
    account = account_time(rows)
    assert account is not None
    assert (account.steps, account.mean_step_s, account.total_s) == (2, 3.0, 6.0)
    assert account.outside_model_frac == pytest.approx(0.25) and account.evaluation_s == 5.0
    assert [time.stage.label for time in account.stages] == ["rollout", "learner"]
    assert account_time([{"step": 0}]) is None


def test_counts_by_reason_are_words() -> None:
    assert counted(3) == "3" and counted({}) == "0"
    assert counted({"over_long": 2, "stale": 1}) == "3: over long 2, stale 1"
