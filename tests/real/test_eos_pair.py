"""A Base student under an Instruct teacher: refused; with the alias it stops, without it it unlearns to.

The teacher gives the student's end token a log-prob of about -12, and a student that is sure of a token moves slowly at
first, so it takes some thirty steps until responses are cut, and sixty to eighty until nearly all are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eos_pair import ALIAS, make_base_student
from whole_runs import ROOT, SMALL, check_nothing_runs, rows

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.errors import EXIT_CONFIG, ConfigError
from opd_megatron.launch.preflight import check_inputs
from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = {"with": 48, "without": 160}
# The check that refuses the pair is taken away, to see what it is there for.
UNCHECKED = (
    "import sys, opd_megatron.launch.preflight as p; from opd_megatron.cli.app import main;"
    "p.compare_tokenizers = lambda *_, **__: None; main(sys.argv[1:])"
)
SETTINGS = [
    *SMALL,
    *("evaluation.every=0", "evaluation.problems=16", "batch.prompts_per_step=16"),
    *("alarms.truncation=stop", "alarms.window=4", "alarms.max_truncated_frac=0.9"),
    *("learner.tensor_parallel=1", "checkpoint.every=500"),
]


def run(program: list[str], directory: Path, student: Path, *more: str) -> tuple[int, str]:
    arguments = ["run", "demo", "--run-dir", str(directory), f"student.path={student}"]
    arguments += [f"steps={STEPS[directory.name]}"]
    done = subprocess.run(
        [sys.executable, *program, *arguments, *SETTINGS, *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    check_nothing_runs(RunDir(directory))
    return done.returncode, done.stdout + done.stderr


def cut_shares(directory: Path) -> list[float]:
    """Of every step, the share of responses that were cut at the token limit."""
    return [row["rollout/truncated_frac"] for row in rows(RunDir(directory).metrics)[1:]]


def test_a_base_student_stops_with_the_alias_and_unlearns_to_without(tmp_path: Path) -> None:
    student = make_base_student(ROOT / "recipes/demo/student", tmp_path / "base")
    demo = apply_overrides(load_recipe("demo")[0], [f"student.path={student}"])
    with pytest.raises(ConfigError, match="unlearn to stop; say") as caught:
        check_inputs(demo)
    assert ALIAS in str(caught.value)

    code, output = run(["-m", "opd_megatron"], tmp_path / "with", student, ALIAS)
    assert code == 0, output
    shares = cut_shares(tmp_path / "with")
    assert len(shares) == STEPS["with"] and max(shares) < 0.15 and "alarm" not in output
    summary = json.loads(RunDir(tmp_path / "with").summary.read_text())
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.2

    code, output = run(["-c", UNCHECKED], tmp_path / "without", student)
    assert code == EXIT_CONFIG, output
    assert "truncation alarm at step" in output
    shares = cut_shares(tmp_path / "without")
    print(shares)
    assert sum(shares[:8]) / 8 < 0.1 and sum(shares[-4:]) / 4 > 0.9
