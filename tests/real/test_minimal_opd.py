"""docs/minimal_opd.py runs, learns, and computes the same loss and gradient as
opd_megatron.losses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.losses.token_loss import TokenInputs, make_token_loss
from opd_megatron.losses.token_stats import token_stats
from opd_megatron.types import Rollout, Sample, TeacherScores

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = ROOT / "recipes" / "demo" / "student", ROOT / "recipes" / "demo" / "teacher"


def load_minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_opd", ROOT / "docs" / "minimal_opd.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal_opd"] = module
    spec.loader.exec_module(module)
    return module


minimal = load_minimal()


def load_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """Rollouts of the demo student, scored; the behavior log-probs are disturbed so that some
    weights are 0.
    """
    student, teacher = load_model(STUDENT), load_model(TEACHER)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for prompt in ("97+59:", "50+16:", "12+34:"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        rollouts += minimal.sample(student, ids, 4, 24, tokenizer.eos_token_id, generator)
    with torch.no_grad():
        teacher_logprobs = minimal.response_logprobs(teacher, rollouts)
    behavior = torch.tensor([x for r in rollouts for x in r.behavior_logprobs])
    behavior = behavior + 0.5 * torch.randn(behavior.shape, generator=generator)
    targets = torch.tensor([token for r in rollouts for token in r.response_ids])
    return {
        "rollouts": rollouts,
        "teacher": teacher_logprobs,
        "behavior": behavior,
        "targets": targets,
    }


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def minimal_loss(recorded: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], Any]:
    student = load_model(STUDENT)
    logprobs = minimal.response_logprobs(student, recorded["rollouts"])
    loss, parts = minimal.opd_loss(logprobs, recorded["teacher"], recorded["behavior"])
    loss.backward()
    return loss.item(), gradients(student), parts


def test_it_runs_as_a_script_and_the_student_moves_towards_the_teacher(tmp_path: Path) -> None:
    steps = 10
    done = subprocess.run(
        [
            *[sys.executable, str(ROOT / "docs" / "minimal_opd.py"), "--steps", str(steps)],
            *["--student", str(STUDENT), "--teacher", str(TEACHER), "--out", str(tmp_path)],
            *["--prompts-per-step", "16"],
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = [line.split() for line in done.stdout.strip().splitlines()]
    assert [line[:2] for line in lines] == [["step", f"{i}/{steps}"] for i in range(1, steps + 1)]
    rows = [dict(zip(line[2::2], map(float, line[3::2]), strict=True)) for line in lines]
    kl = [row["kl"] for row in rows]
    assert sum(kl[-4:]) < 0.85 * sum(kl[:4])
    assert all(row["masked"] == 0.0 for row in rows)
    before, after = (load_model(d).model.embed_tokens.weight.detach() for d in (STUDENT, tmp_path))
    assert not torch.equal(before, after)


def test_it_stays_readable() -> None:
    assert len((ROOT / "docs" / "minimal_opd.py").read_text().splitlines()) <= 200


def test_recorded_logprobs_are_the_ones_that_are_recomputed(recorded: dict[str, Any]) -> None:
    with torch.no_grad():
        logprobs = minimal.response_logprobs(load_model(STUDENT), recorded["rollouts"])
    sampled = torch.tensor([x for r in recorded["rollouts"] for x in r.behavior_logprobs])
    torch.testing.assert_close(logprobs, sampled, rtol=0, atol=1e-4)


def test_the_loss_package_gives_the_same_loss_and_gradient(recorded: dict[str, Any]) -> None:
    wanted_loss, wanted, parts = minimal_loss(recorded)
    student = load_model(STUDENT)
    stats = token_stats(
        minimal.response_logits(student, recorded["rollouts"]),
        recorded["targets"],
        vocab_size=student.config.vocab_size,
    )
    inputs = TokenInputs(
        behavior_logprobs_T=recorded["behavior"],
        teacher_logprobs_T=recorded["teacher"],
        mask_T=torch.ones(len(recorded["targets"])),
    )
    output = make_token_loss()(stats, inputs)
    loss = output.loss_sum / len(recorded["targets"])
    loss.backward()
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-5)
    assert 0 < int((parts["weights"] == 0).sum()) < len(parts["weights"])
    torch.testing.assert_close(output.weights_T, parts["weights"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.advantages_T, parts["advantages"], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(student).items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * scale)


def as_samples(recorded: dict[str, Any]) -> list[Sample]:
    samples, start = [], 0
    for number, rollout in enumerate(recorded["rollouts"]):
        tokens = slice(start, start + len(rollout.response_ids))
        start = tokens.stop
        made = Rollout(
            sample_id=f"s{number}",
            prompt_id=f"p{number // 4}",
            prompt_ids=rollout.prompt_ids,
            response_ids=rollout.response_ids,
            behavior_logprobs=recorded["behavior"][tokens].numpy().astype(np.float32),
            finish_reason="stop",
            version_first=0,
            version_last=0,
            server="none",
        )
        teacher_logprobs = recorded["teacher"][tokens].numpy().astype(np.float32)
        samples.append(Sample(made, TeacherScores("main", teacher_logprobs)))
    return samples


def run_learner(batch: Path, out: Path, tp: int, dp: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = tp * dp
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    worker = Path(__file__).with_name("learner_gradient_worker.py")
    command = [sys.executable, str(worker), str(STUDENT), str(batch), str(out), str(tp), str(dp)]
    ranks = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=150)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)


# One process alone, and two; every other layout is in test_megatron_layouts.
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1)])
def test_the_megatron_learner_gives_the_same_loss_and_gradient(
    recorded: dict[str, Any], tmp_path: Path, tp: int, dp: int
) -> None:
    wanted_loss, wanted, parts = minimal_loss(recorded)
    write_batch(tmp_path / "batch.safetensors", 1, 0, as_samples(recorded))
    run_learner(tmp_path / "batch.safetensors", tmp_path, tp, dp)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["train/loss"] == pytest.approx(wanted_loss, rel=1e-5)
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert metrics["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    values = load_file(tmp_path / "values.safetensors")
    torch.testing.assert_close(values["weights"], parts["weights"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["advantages"], parts["advantages"], rtol=1e-4, atol=1e-5)
    seen = load_file(tmp_path / "gradient" / "model.safetensors")
    assert set(seen) == set(wanted)
    for name, gradient in wanted.items():
        difference = float((seen[name] - gradient).norm() / gradient.norm())
        assert difference <= 1e-5, f"{name}: {difference:.1e}"
