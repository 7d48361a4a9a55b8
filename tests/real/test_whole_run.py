"""One whole run on real parts: killed without mercy, resumed, exported, evaluated by what it left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml
from kill_runs import Plan, kill_once
from whole_runs import (
    PROMPTS,
    check_finished,
    check_nothing_runs,
    command_line,
    members,
    of_role,
    rows,
    start,
    wait_until,
)

from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

STEPS = 4
SETTINGS = [f"steps={STEPS}", "evaluation.every=0", "observe.show_rollout_every=2"]
SETTINGS.append("checkpoint.async_save=true")  # the other runs of the suite save synchronously


@dataclass
class Finished:
    """A run that was killed twice and then resumed to its end, and what was seen of the last attempt."""

    run: RunDir
    output: str
    listening: list[tuple[str, str, int]] = field(default_factory=list)
    command_lines: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)


def _look(seen: Finished) -> None:
    """Note sockets and command lines of every process while all roles work."""
    for process in members(seen.run):
        try:
            seen.command_lines.append(command_line(process))
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    address = connection.laddr
                    seen.listening.append((command_line(process), address.ip, address.port))
        except psutil.NoSuchProcess:
            continue
    keys = seen.run.attempt(seen.run.attempts()[-1]).keys
    seen.secrets += json.loads(keys.read_text()).values()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("whole")
    run, output = RunDir(folder / "run"), folder / "output.txt"
    # A rank in the middle of a commit, then everything at once while the next attempt starts.
    first = kill_once(run, Plan("rank", "commit", 0.5), 0, 0, output, SETTINGS)
    assert first is not None and first.code == 75
    second = kill_once(run, Plan("everything", "start", 0.2), 1, 0, output, SETTINGS)
    assert second is not None and second.code is None
    mark = output.stat().st_size
    process = start("run", "demo", "--run-dir", str(run.root), "--resume", output=output)
    seen = Finished(run, "")
    attempt = run.attempt(3)
    wait_until(
        lambda: any(attempt.batches.glob("*")) or process.poll() is not None, 150, "training"
    )
    assert process.poll() is None, output.read_text()
    assert all(of_role(run, role) for role in ("controller", "agent", "rank", "rollout", "teacher"))
    _look(seen)
    assert process.wait(timeout=200) == 0, output.read_text()
    seen.output = output.read_bytes()[mark:].decode()
    return seen


def test_a_killed_run_goes_on_and_trains_every_prompt_once(finished: Finished) -> None:
    check_nothing_runs(finished.run)
    check_finished(finished.run, STEPS)
    assert json.loads(finished.run.summary.read_text())["attempts"] == 3


def test_every_step_has_one_row_and_the_run_explains_itself(finished: Finished) -> None:
    run = finished.run
    metrics = rows(run.metrics)
    assert all(row["offpolicy/age_max"] == 0 for row in metrics[1:])
    assert max(row["offpolicy/logprob_diff_max"] for row in metrics[1:]) < 1e-3
    assert finished.output.splitlines()[-1].startswith("demo: accuracy ")
    assert "<svg" in run.report.read_text()
    assert yaml.safe_load(run.run_yaml.read_text())["recipe"]["steps"] == STEPS
    assert len(rows(run.ledger)[0]["positions"]) == PROMPTS


def test_every_socket_of_a_run_listens_on_loopback_only(finished: Finished) -> None:
    words = ("megatron.torchrun", "megatron.learner", "demo/student", "demo/teacher")
    for word in words:  # all of them listen, so the check below is about all of them
        assert any(word in line for line, _, _ in finished.listening), word
    assert [entry for entry in finished.listening if entry[1] not in ("127.0.0.1", "::1")] == []


def test_no_key_is_in_a_command_line_a_log_or_any_file_of_the_run(finished: Finished) -> None:
    assert len(set(finished.secrets)) == 2
    for line in finished.command_lines:
        assert not any(secret in line for secret in finished.secrets), line
    assert not any(secret in finished.output for secret in finished.secrets)
    for path in finished.run.root.rglob("*"):
        if path.is_file() and path.name != "keys.json":
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in finished.secrets), path
    assert [p.parent.name for p in finished.run.root.rglob("keys.json")] == ["3"]


def test_the_exported_student_loads_in_transformers(finished: Finished, tmp_path: Path) -> None:
    run, out, output = finished.run, tmp_path / "student", tmp_path / "output.txt"
    process = start("export", str(run.root), "--out", str(out), output=output)
    assert process.wait(timeout=120) == 0, output.read_text()
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    published = load_file(run.published()[-1] / "model.safetensors")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in published.items())


def test_a_finished_run_is_not_started_over(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    process = start("run", "demo", *SETTINGS, "--run-dir", str(finished.run.root), output=output)
    assert process.wait(timeout=120) == 78
    assert "holds a run already" in output.read_text()


@pytest.mark.slow
def test_a_run_whose_last_commit_is_there_only_lacks_its_summary(
    finished: Finished, tmp_path: Path
) -> None:
    """As after a kill between the last commit and the summary: no role has to start for that."""
    run, output = finished.run, tmp_path / "output.txt"
    before = json.loads(run.summary.read_text())
    run.summary.unlink()
    process = start("run", "demo", "--run-dir", str(run.root), "--resume", output=output)
    assert process.wait(timeout=120) == 0, output.read_text()
    after = json.loads(run.summary.read_text())
    assert (
        after["ledger"] == before["ledger"] and after["accuracy_after"] == before["accuracy_after"]
    )
    assert "ready after" not in output.read_text().replace("[learner] ready after", "")


def test_a_damaged_run_directory_ends_the_run_with_the_reason(
    finished: Finished, tmp_path: Path
) -> None:
    """Last in this file: it breaks the run."""
    run = finished.run
    resume = ["run", "demo", "--run-dir", str(run.root), "--resume"]

    def refused(name: str) -> str:
        output = tmp_path / name
        process = start(*resume, output=output)
        assert process.wait(timeout=90) == 78, output.read_text()
        check_nothing_runs(run)
        return output.read_text()

    good = run.run_yaml.read_text()
    run.run_yaml.write_text(good.replace("lr: 0.001", "lr: 0.002"))
    assert "optimizer.lr: 0.001 -> 0.002" in refused("value")
    run.run_yaml.write_text(good)
    for commit in run.checkpoints.glob("step_*"):
        next((commit / "model").glob("*.distcp")).unlink()
    text = refused("shard")
    assert "no commit of this run verifies" in text and ".distcp is missing" in text
