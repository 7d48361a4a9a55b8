"""One whole run on real parts: killed without mercy, resumed, exported, evaluated by what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from opd_megatron.launch.supervisor import ATTEMPT_VARIABLE

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    *("steps=4", "checkpoint.every=2", "evaluation.every=0", "evaluation.problems=8"),
    *("evaluation.kl_problems=4", "batch.prompts_per_step=8", "observe.show_rollout_every=2"),
]


def opd(*arguments: str, **options) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "opd_megatron", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def alive(run: Path) -> list[int]:
    """Processes of any attempt of a run."""
    identities = {p.read_text() for p in (run / "attempts").glob("*/attempt_id")}
    found = []
    for process in psutil.process_iter():
        try:
            is_member = process.environ().get(ATTEMPT_VARIABLE) in identities
            if is_member and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose supervisor was killed after the first commit, then resumed to its end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    first = opd("run", "demo", *SETTINGS, "--run-dir", str(run))
    try:
        wait_until(lambda: (run / "checkpoints" / "step_000002").is_dir(), 150)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    wait_until(lambda: alive(run) == [], 20)
    second = opd("run", "demo", *SETTINGS, "--run-dir", str(run), "--resume")
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    return run, output


def test_a_killed_run_goes_on_and_trains_every_prompt_once(finished: tuple[Path, str]) -> None:
    run, output = finished
    assert "resumed from step_00000" in output
    ledger = rows(run / "ledger.jsonl")
    assert [row["step"] for row in ledger] == [1, 2, 3, 4]
    positions = [position for row in ledger for position in row["positions"]]
    assert sorted(positions) == list(range(32))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ledger"] == {"issued": 32, "trained": 32, "rejected": {}, "in_flight": 0}
    assert summary["attempts"] == 2


def test_every_step_has_one_row_and_the_run_explains_itself(finished: tuple[Path, str]) -> None:
    run, output = finished
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert all(row["offpolicy/age_max"] == 0 for row in metrics[1:])
    assert max(row["offpolicy/logprob_diff_max"] for row in metrics[1:]) < 1e-3
    assert output.splitlines()[-1].startswith("demo: accuracy ")
    assert "<svg" in (run / "report.html").read_text()
    assert yaml.safe_load((run / "run.yaml").read_text())["recipe"]["steps"] == 4


def test_nothing_survives_and_no_key_is_written_anywhere_else(finished: tuple[Path, str]) -> None:
    run, _ = finished
    assert alive(run) == []
    secrets = [
        value.encode()
        for path in run.glob("attempts/*/keys.json")
        for value in json.loads(path.read_text()).values()
    ]
    assert len(secrets) == 4
    for path in run.rglob("*"):
        if path.is_file() and path.name != "keys.json":
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path


def test_the_exported_student_loads_in_transformers(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = finished
    out = tmp_path / "student"
    process = opd("export", str(run), "--out", str(out))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    published = load_file(run / "weights" / "v000004" / "model.safetensors")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in published.items())


def test_a_second_run_in_the_same_directory_is_refused(finished: tuple[Path, str]) -> None:
    run, _ = finished
    process = opd("run", "demo", *SETTINGS, "--run-dir", str(run))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert "add --resume" in output
