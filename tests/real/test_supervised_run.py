"""Supervised training on real parts: its loss is that of transformers, and a killed run ends at the same bits.

Two runs of the same recipe: one straight through with an evaluation, so with a rollout server; one without (`slow`),
whose every process is killed on the way and which is resumed. Training draws nothing, so they must agree to the bit.
Going on from the result with on-policy distillation is `slow` too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from whole_runs import ROOT, check_nothing_runs, check_tidy, rows, start, wait_until

from opd_megatron.controller import commit
from opd_megatron.rundir import RunDir

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

STEPS, ROWS = 24, 16
SETTINGS = [
    *(f"steps={STEPS}", f"batch.prompts_per_step={ROWS}", "optimizer.schedule=constant"),
    *("optimizer.min_lr=0", "checkpoint.every=4", "observe.show_rollout_every=0"),
    *("evaluation.every=12", "evaluation.problems=8", "evaluation.samples_per_problem=2"),
    "preflight.samples=2",
]
DEMO = ROOT / "recipes" / "demo"


@dataclass(frozen=True)
class Finished:
    run: RunDir
    output: str


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("straight")
    run, output = RunDir(folder / "run"), folder / "output.txt"
    process = start("run", "demo_sft", *SETTINGS, "--run-dir", str(run.root), output=output)
    assert process.wait(timeout=200) == 0, output.read_text()
    return Finished(run, output.read_text())


def check_all_trained(run: RunDir) -> None:
    assert [row["step"] for row in rows(run.ledger)] == list(range(1, STEPS + 1))
    total = STEPS * ROWS
    ledger = {"issued": total, "trained": total, "rejected": {}, "in_flight": 0}
    assert json.loads(run.summary.read_text())["ledger"] == ledger
    assert run.published()[-1].name == f"v{STEPS:06d}"
    check_tidy(run)


@pytest.mark.slow
def test_a_killed_run_ends_at_the_bits_of_a_straight_one(
    straight: Finished, tmp_path: Path
) -> None:
    killed, output = RunDir(tmp_path / "killed"), tmp_path / "output.txt"
    arguments = ["demo_sft", *SETTINGS, "data.heldout=", "--run-dir", str(killed.root)]
    process = start("run", *arguments, output=output)
    first = killed.checkpoints / "step_000004"
    wait_until(lambda: first.exists() or process.poll() is not None, 120, "a commit", 0.001)
    process.kill()
    process.wait()
    check_nothing_runs(killed)
    assert commit.committed_steps(killed.checkpoints)[-1] < STEPS, "killed too late"
    arguments = ["demo_sft", "--run-dir", str(killed.root), "--resume"]
    process = start("run", *arguments, output=output)
    assert process.wait(timeout=120) == 0, output.read_text()
    check_nothing_runs(killed)
    check_all_trained(killed)
    assert json.loads(killed.summary.read_text())["attempts"] == 2
    # Without an evaluation no server is started, and only the end is published.
    assert json.loads(killed.attempt(2).endpoints.read_text()) == {"rollout": []}
    assert len(killed.published()) == 1
    ends = [run.published()[-1] / "model.safetensors" for run in (straight.run, killed)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_every_row_is_trained_and_weights_are_published_for_evaluations_alone(
    straight: Finished,
) -> None:
    check_all_trained(straight.run)
    last, first = straight.run.published()[-1], DEMO / "student"
    assert (last / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()
    measured = {row["step"]: row for row in rows(straight.run.metrics) if "perf/eval_s" in row}
    assert list(measured) == [0, 12, STEPS]
    assert all("eval/heldout/accuracy" in row for row in measured.values())
    published = [row["step"] for row in rows(straight.run.metrics) if row.get("perf/publish_s")]
    assert published == [12, STEPS]
    assert straight.output.splitlines()[-1].startswith("demo_sft: accuracy ")


def test_nothing_is_reported_that_compares_with_a_teacher_or_an_engine(straight: Finished) -> None:
    metrics = rows(straight.run.metrics)
    names = {name for row in metrics for name in row}
    assert not any(name.startswith(("teacher/", "offpolicy/")) or "kl_" in name for name in names)
    assert metrics[-1]["train/cross_entropy"] < 0.9 * metrics[1]["train/cross_entropy"]
    summary = json.loads(straight.run.summary.read_text())
    assert summary["accuracy_after"] is not None and summary["kl_after"] is None
    assert "Cross-entropy" in straight.run.report.read_text()


def test_loss_and_gradient_norm_are_those_of_transformers_on_the_same_rows(
    straight: Finished,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = (DEMO / "demonstrations.jsonl").read_text().splitlines()
    by_id = {row["id"]: row for row in map(json.loads, lines)}
    first = rows(straight.run.metrics)[1]
    chosen = [by_id[name] for name in rows(straight.run.ledger)[0]["prompt_ids"]]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "student", dtype=torch.float32)
    ids, labels = [], []
    for row in chosen:
        asked = [{"role": "user", "content": row["prompt"]}]
        answered = [*asked, {"role": "assistant", "content": row["response"]}]
        whole = tokenizer.apply_chat_template(answered, return_dict=False)
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BT, labels_BT = pad(ids, True), pad(labels, True, -100)
    mask_BT = pad([torch.ones_like(one) for one in ids], True)
    loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    assert first["train/tokens"] == int((labels_BT >= 0).sum())
    assert first["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["train/cross_entropy"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.slow
def test_on_policy_distillation_goes_on_from_the_result(straight: Finished, tmp_path: Path) -> None:
    student, output, run = tmp_path / "student", tmp_path / "output.txt", RunDir(tmp_path / "run")
    process = start("export", str(straight.run.root), "--out", str(student), output=output)
    assert process.wait(timeout=120) == 0, output.read_text()
    small = ["steps=2", "batch.prompts_per_step=8", "evaluation.problems=8", "preflight.samples=2"]
    arguments = ["run", "demo", f"student.path={student}", *small, "--run-dir", str(run.root)]
    process = start(*arguments, output=output)
    assert process.wait(timeout=300) == 0, output.read_text()
    before = rows(straight.run.metrics)[-1]["train/entropy"]
    assert rows(run.metrics)[-1]["train/kl_reverse"] is not None and before > 0
    assert (student / "model.safetensors").read_bytes() == (
        straight.run.published()[-1] / "model.safetensors"
    ).read_bytes()
