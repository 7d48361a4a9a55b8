"""What `opd` answers to a user: every mistake is one message with key, value, rule and fix, and exit code 78.

What starts processes is in tests/real; that no command loads torch is in test_no_torch.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_megatron.cli.app import main
from opd_megatron.cli.runs import _recipe_or_run, _started
from opd_megatron.config.recipes import load_recipe, resolve_recipe
from opd_megatron.config.run_yaml import write_run_yaml
from opd_megatron.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from opd_megatron.rundir import RunDir

Opd = Callable[..., tuple[int, str]]


@pytest.fixture
def opd(capsys: pytest.CaptureFixture[str]) -> Opd:
    """Run a command in this process; returns its exit code and all it printed."""

    def call(*arguments: str) -> tuple[int, str]:
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        else:
            code = EXIT_DONE
        captured = capsys.readouterr()
        assert isinstance(code, int | None)
        return code or EXIT_DONE, captured.out + captured.err

    return call


def write_run(folder: Path, *overrides: str) -> RunDir:
    recipe, path = resolve_recipe("demo", overrides)
    folder.mkdir(exist_ok=True)
    run = RunDir(folder)
    write_run_yaml(run.run_yaml, recipe, path, overrides)
    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], ["No such command 'rnu'", "Did you mean 'run'"]),
        (["recipes", "lst"], ["Did you mean 'list'"]),
        (["run"], ["Missing argument 'RECIPE'"]),
        (["run", "demo", "--rundir", "x"], ["--rundir", "--run-dir"]),
        (["run", "demo", "--resume"], ["--resume=True", "add --run-dir"]),
        (["run", "dmeo"], ["RECIPE='dmeo'", "did you mean 'demo'"]),
        (["validate", "no/such.py"], ["RECIPE='no/such.py'", "give the path"]),
        (["validate", "demo", "stpes=3"], ["stpes", "did you mean 'steps'"]),
        (["validate", "demo", "steps=1.5"], ["steps='1.5'", "must be int", "steps=2"]),
        (["validate", "demo", "steps=0", "optimizer.lr=5"], ["steps=0", "at least 1", "lr=5.0"]),
        (["validate", "demo", "student.path="], ["student.path=''", "set student.path=DIR"]),
        (["validate", "demo", "student.path=/no"], ["student.path='/no'", "no such directory"]),
        (["validate", "demo", "data.train=no.jsonl"], ["data.train='no.jsonl'", "no such file"]),
        (["validate", "demo", "evaluation.grader=exact"], ["did you mean 'exact_match'"]),
        (
            ["validate", "demo", "learner.tensor_parallel=3"],
            ["learner.tensor_parallel=3", "divide"],
        ),
        (["validate", "demo", "learner.pipeline_parallel=5"], ["num_hidden_layers = 2", "divisor"]),
        (
            ["validate", "demo", "rollout.server.max_total_tokens=0"],
            ["rollout.server.max_total_tokens=0", "on a CPU", "=16384"],
        ),
        (
            ["validate", "demo", "rollout.server.max_total_tokens=8"],
            ["rollout.server.max_total_tokens=8", "32 tokens", "raise it"],
        ),
        (["report", "/no/such"], ["run directory='/no/such'", "check the path"]),
        (["export", "/no/such"], ["Missing option '--out'"]),
        (["export", "/no/such", "--out", "x"], ["run directory='/no/such'", "check the path"]),
        (["eval", "demo", "data.heldout="], ["data.heldout=''", "set data.heldout=FILE"]),
        (["eval", "demo", "--model", "/no"], ["student.path='/no'", "no such directory"]),
        (["doctor", "x"], ["unexpected extra argument"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_a_mistake_is_explained_and_ends_with_78(
    opd: Opd,
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = opd(*arguments)
    assert code == EXIT_CONFIG
    assert all(word in text for word in words), text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []  # nothing was started, nothing is left


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["recipes", "list"], ["validate", "demo"]]
)
def test_a_right_command_ends_with_0(opd: Opd, arguments: list[str]) -> None:
    code, text = opd(*arguments)
    assert code == EXIT_DONE and text


def test_a_run_directory_that_cannot_be_made_is_named(opd: Opd, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, text = opd("run", "demo", "--run-dir", str(tmp_path / "file"))
    assert code == EXIT_CONFIG and "--run-dir=" in text and "choose another directory" in text


def test_resuming_where_there_is_no_run_makes_no_directory(opd: Opd, tmp_path: Path) -> None:
    code, text = opd("run", "demo", "--resume", "--run-dir", str(tmp_path / "run"))
    assert code == EXIT_CONFIG and "has no run.yaml" in text
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_is_refused_where_a_run_is(opd: Opd, tmp_path: Path) -> None:
    write_run(tmp_path)
    code, text = opd("run", "demo", "--run-dir", str(tmp_path))
    assert code == EXIT_CONFIG and "holds a run already" in text and "--resume" in text


def test_a_gpu_recipe_is_refused_before_anything_starts(
    opd: Opd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_megatron.launch.preflight._NVIDIA_DRIVER", (tmp_path / "none",))
    code, text = opd("run", "demo", "device=cuda", "--run-dir", str(tmp_path / "run"))
    assert code == EXIT_CONFIG and "device='cuda'" in text and "device=cpu" in text
    assert not (tmp_path / "run").exists()


def test_resume_goes_on_as_the_run_was_started(tmp_path: Path) -> None:
    run = write_run(tmp_path, "steps=7", "optimizer.lr=1e-4")
    recipe, path, overrides = _started(run, "demo", ["steps=9"])
    assert (recipe.steps, recipe.optimizer.lr) == (9, 1e-4)
    assert overrides == ["steps=7", "optimizer.lr=1e-4", "steps=9"]
    assert path == load_recipe("demo")[1]


def test_resume_refuses_what_would_make_another_run(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer.lr=0.5: this run was started with 0.001"):
        _started(run, "demo", ["optimizer.lr=0.5", "steps=9"])
    with pytest.raises(ConfigError, match="is of 'demo'; say demo"):
        _started(run, "other", [])


def test_evaluating_a_run_takes_its_newest_weights_and_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path, "evaluation.problems=5")
    with pytest.raises(ConfigError, match="published no weights"):
        _recipe_or_run(str(tmp_path), [], None)
    for version in (9, 10):
        (run.weights / f"v{version:06d}").mkdir(parents=True)
    recipe, _, _ = _recipe_or_run(str(tmp_path), ["evaluation.samples_per_problem=3"], None)
    assert recipe.student.path == str(run.weights / "v000010")
    assert (recipe.evaluation.problems, recipe.evaluation.samples_per_problem) == (5, 3)
    recipe, _, _ = _recipe_or_run(str(tmp_path), [], tmp_path)
    assert recipe.student.path == str(tmp_path)


def test_evaluating_a_run_that_broadcasts_says_how_to_get_its_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path, "weight_sync.route=broadcast")
    (run.weights / "v000003").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"leaves no directory .*; opd export .* --model DIR"):
        _recipe_or_run(str(tmp_path), [], None)
    assert _recipe_or_run(str(tmp_path), [], tmp_path)[0].student.path == str(tmp_path)


def test_validate_counts_bad_rows_by_reason_and_shows_where(opd: Opd, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"{n}+11:"}) for n in range(10, 99)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*rows, "{", '{"question": "1+1:"}']) + "\n")
    code, text = opd("validate", "demo", f"data.train={path}", "data.max_bad_rows_frac=0.05")
    assert code == EXIT_DONE
    assert "data.train: 89 of 91 rows well formed; rejected: broken_json 1, missing_key 1" in text
    assert "train.jsonl:90: broken_json" in text and "train.jsonl:91: missing_key" in text
    code, text = opd("validate", "demo", f"data.train={path}")
    assert code == EXIT_CONFIG and "data.max_bad_rows_frac=0.01" in text
