"""What a killed attempt leaves behind goes when the next one begins; what explains the run stays."""

from __future__ import annotations

from pathlib import Path

from opd_megatron.launch import leftovers
from opd_megatron.launch.members import scratch_folder
from opd_megatron.rundir import RunDir

IDENTITY = "0123456789abcdef" * 2


def killed_run(root: Path) -> RunDir:
    run = RunDir(root)
    attempt = run.attempt(1)
    for folder in (attempt.mailbox, attempt.batches, run.logs / "attempt_1"):
        folder.mkdir(parents=True)
    attempt.identity.write_text(IDENTITY)
    for path in (
        attempt.keys,
        attempt.endpoints,
        attempt.grace,
        attempt.mailbox / "command_000001.json",
        attempt.batches / "step_000003.safetensors",
        attempt.batches / "preflight.safetensors",
        attempt.batches / ".step_000004.safetensors.77.tmp",
        attempt.batches / "refused_1_step_000002.safetensors",
        run.logs / "attempt_1" / "controller.log",
        run.root / ".run.yaml.77.tmp",
        run.run_yaml,
        run.checkpoints / "step_000002" / "manifest.json",
        run.checkpoints / ".step_000004.tmp" / "model" / "half",
        run.weights / "v000002" / "model.safetensors",
        run.weights / ".v000003.77.tmp" / "model.safetensors",
        run.weights / ".v000003.old" / "model.safetensors",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (run.logs / ".latest.77").symlink_to("attempt_1")
    return run


def test_only_what_explains_the_run_stays(tmp_path: Path) -> None:
    run = killed_run(tmp_path / "run")
    scratch_folder(IDENTITY).mkdir()
    leftovers.remove(run, 1)
    leftovers.remove_temporaries(run)
    files = {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if not p.is_dir()}
    assert files == {
        "run.yaml",
        "attempts/1/attempt_id",
        "attempts/1/batches/refused_1_step_000002.safetensors",
        "logs/attempt_1/controller.log",
        "checkpoints/step_000002/manifest.json",
        "weights/v000002/model.safetensors",
    }
    assert not scratch_folder(IDENTITY).exists()


def test_an_attempt_that_was_killed_while_it_was_made_is_no_obstacle(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.attempt(1).root.mkdir(parents=True)
    leftovers.remove(run, 1)
    leftovers.remove_temporaries(run)
    assert run.attempts() == [1]
