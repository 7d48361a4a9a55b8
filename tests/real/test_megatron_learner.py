"""A real learner world (torchrun, TP=2, gloo) driven through the mailbox, over two launches.

The first launch, of new Pythons as on a GPU, trains, publishes, saves, trains on and meets a batch with a NaN; the
second, of forked ranks, resumes from the checkpoint on the same recorded batches, must arrive at the same bits, refuses
a stale batch and ends with it. Not covered here: other layouts (test_megatron_layouts.py) and servers
reading the published directory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from opd_megatron.atomic import read_json
from opd_megatron.config.run_yaml import write_run_yaml
from opd_megatron.config.schema import (
    BatchConfig,
    CorrectionConfig,
    LearnerConfig,
    OptimizerConfig,
    Recipe,
    RolloutConfig,
    StudentConfig,
)
from opd_megatron.exchange import mailbox
from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.types import Sample

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).parents[2]
VOCAB = 67
LENGTHS = [(3, 9), (5, 1), (2, 20), (7, 0), (1, 14), (4, 4)]
TEMPERATURE = 0.8
ANSWER_TIMEOUT_S = 60.0


def _load_tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "megatron_tiny", Path(__file__).with_name("megatron_tiny.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _load_tiny()


@dataclass
class Learner:
    """A torchrun world and its mailbox."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    number: int = 0

    def answer_to(self, kind: str, **arguments: Any) -> dict[str, Any]:
        self.number += 1
        mailbox.post_command(self.folder, self.number, kind, **arguments)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while (answer := mailbox.read_answer(self.folder, self.number)) is None:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.005)
        return answer

    def ask(self, kind: str, **arguments: Any) -> dict[str, Any]:
        answer = self.answer_to(kind, **arguments)
        assert answer["ok"], answer
        return answer["result"]


PLAIN = ("torch.distributed.run", "--standalone")
FORKED = ("opd_megatron.megatron.torchrun", "--opd-fork")


def start(work: Path, recipe: Recipe, name: str, launcher: tuple[str, ...] = FORKED) -> Learner:
    """Launch a world and wait until it is ready."""
    folder, log = work / name, work / f"{name}.log"
    folder.mkdir()
    write_run_yaml(work / "run.yaml", recipe, Path("recipe.py"), [])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", *launcher),
                *("--nproc-per-node", str(recipe.learner.world_size)),
                *("-m", "opd_megatron.megatron.learner"),
                *("--run-yaml", str(work / "run.yaml"), "--mailbox", str(folder)),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 120
    while not (folder / mailbox.READY).exists():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.05)
    return Learner(process, folder, log)


def _poisoned(samples: list[Sample]) -> list[Sample]:
    """The same samples with one NaN among the teacher's log-probs."""
    scores = samples[2].scores
    values = scores.sampled_logprobs.copy()
    values[7] = np.nan
    bad = dataclasses.replace(
        samples[2], scores=dataclasses.replace(scores, sampled_logprobs=values)
    )
    return [*samples[:2], bad, *samples[3:]]


@dataclass
class Story:
    """What happened in both launches."""

    ready: dict[str, Any]
    results: dict[str, Any]
    published: dict[str, Path]
    samples: list[list[Sample]]
    work: Path
    stale: dict[str, Any]
    stale_exit_code: int
    survivors: list[int]


def _batches(work: Path) -> list[list[Sample]]:
    return [
        tiny.write_samples(work / f"batch{i}", LENGTHS, VOCAB, seed=i, version=i) for i in range(5)
    ]


def _first_launch(work: Path, recipe: Recipe, results: dict[str, Any]) -> dict[str, Any]:
    learner = start(work, recipe, "first", PLAIN)

    def train(i: int) -> Any:
        return learner.ask("train", batch=str(work / f"batch{i}"), out=str(work / f"out{i}"))

    def publish(name: str) -> Any:
        probes = [[1, 2, 3, 4, 5], [6, 7]]
        return learner.ask("publish", directory=str(work / name), version=1, probe_tokens=probes)

    results["load"] = learner.ask("load", source="hf", path=recipe.student.path)
    results["publish0"] = publish("v0")
    results["score"] = learner.ask("score", batch=str(work / "batch0"), out=str(work / "score0"))
    results["train0"], results["train1"] = train(0), train(1)
    publish("v2")
    for name in ("commit", "commit_while_training"):
        (work / name).mkdir()
    results["save"] = learner.ask("save", directory=str(work / "commit"))
    learner.ask("begin_save", directory=str(work / "commit_while_training"))
    results["train2"], results["train3"] = train(2), train(3)
    while (finished := learner.ask("finish_save"))["files"] is None:
        pass
    results["finish_save"] = finished
    results["publish4"] = publish("v4")
    results["nan"] = train(4)
    results["publish_after_nan"] = publish("v4_after_nan")
    learner.ask("stop")
    results["exit_code"] = learner.process.wait(120)
    return read_json(learner.folder / mailbox.READY)


def _second_launch(
    work: Path, recipe: Recipe, results: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    learner = start(work, recipe, "second")
    path = str(work / "commit_while_training")
    learner.ask("load", source="weights", path=path)
    learner.ask("publish", directory=str(work / "v2_alone"), version=2, probe_tokens=[[1, 2]])
    results["resume"] = learner.ask("load", source="commit", path=path)
    for i in (2, 3):
        results[f"resumed{i}"] = learner.ask(
            "train", batch=str(work / f"batch{i}"), out=str(work / f"out_r{i}")
        )
    learner.ask("publish", directory=str(work / "v4_resumed"), version=4, probe_tokens=[])
    samples = tiny.make_samples(LENGTHS, VOCAB, seed=9, version=3)
    write_batch(work / "stale", step=9, weight_version=4, samples=samples)
    arguments = {"batch": str(work / "stale"), "out": str(work / "x")}
    stale = learner.answer_to("train", **arguments)
    return stale, learner.process.wait(120)


def _ranks_left_after_kill(work: Path, recipe: Recipe) -> list[int]:
    """Kill torchrun itself with SIGKILL; which ranks are alive half a minute later?"""
    learner = start(work, recipe, "killed")
    pids = read_json(learner.folder / mailbox.READY)["pids"]
    ranks = [psutil.Process(pid) for pid in pids]
    learner.process.send_signal(signal.SIGKILL)
    learner.process.wait(120)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    return [process.pid for process in alive]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    work = tmp_path_factory.mktemp("learner")
    model = tiny.write_model(work / "student", num_hidden_layers=2, vocab_size=VOCAB)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    recipe = Recipe(
        device="cpu",
        student=StudentConfig(path=str(model)),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        steps=6,
        optimizer=OptimizerConfig(
            lr=1e-2, clip_grad=0.1, schedule="cosine", warmup_steps=3, min_lr=1e-3
        ),
        correction=CorrectionConfig(kind="masked"),
        batch=BatchConfig(tokens_per_microbatch=48),
        learner=LearnerConfig(precision="fp32", tensor_parallel=2, step_timeout_s=60.0),
    )
    samples = _batches(work)
    write_batch(work / "batch4", step=4, weight_version=4, samples=_poisoned(samples[4]))
    results: dict[str, Any] = {}
    ready = _first_launch(work, recipe, results)
    stale, exit_code = _second_launch(work, recipe, results)
    survivors = _ranks_left_after_kill(work, recipe)
    names = ("v0", "v2", "v2_alone", "v4", "v4_after_nan", "v4_resumed")
    yield Story(
        ready, results, {n: work / n for n in names}, samples, work, stale, exit_code, survivors
    )


def _weights(directory: Path) -> dict[str, Any]:
    return load_file(directory / "model.safetensors")


def _same_weights(a: Path, b: Path) -> bool:
    left, right = _weights(a), _weights(b)
    return set(left) == set(right) and all(np.array_equal(left[n], right[n]) for n in left)


def test_ready_file_names_the_world(story: Story) -> None:
    assert story.ready["layout"] == {"tp": 2, "pp": 1, "cp": 1, "dp": 1, "vpp": 1}
    assert story.ready["world_size"] == len(set(story.ready["pids"])) == 2
    assert story.results["exit_code"] == 0


def test_loaded_weights_publish_back_unchanged_with_every_other_file(story: Story) -> None:
    published, student = story.published["v0"], story.work / "student"
    assert _same_weights(published, student)
    assert {p.name for p in published.iterdir()} == {p.name for p in student.iterdir()}
    config = json.loads((student / "config.json").read_text())
    assert json.loads((published / "config.json").read_text()) == config
    size = (published / "model.safetensors").stat().st_size
    assert story.results["publish0"]["bytes"] == size
    assert story.results["publish0"]["tensors"] == len(_weights(published))


def test_probes_follow_the_weights(story: Story) -> None:
    before = story.results["publish0"]["probe_logprobs"]
    after = story.results["publish4"]["probe_logprobs"]
    assert [len(p) for p in before] == [4, 1]
    assert all(x < 0 for probe in before for x in probe)
    assert max(abs(x - y) for x, y in zip(before[0], after[0], strict=True)) > 1e-3


def test_scores_and_training_see_the_same_student(story: Story) -> None:
    scores, outputs = (load_file(story.work / name) for name in ("score0", "out0"))
    total = sum(response for _, response in LENGTHS)
    assert story.results["score"]["tokens"] == total
    for name in ("student_logprobs", "student_entropy"):
        assert scores[name].shape == (total,)
        assert np.array_equal(scores[name], outputs[name])


def test_outputs_are_the_loss_inputs_in_batch_order(story: Story) -> None:
    outputs, samples = load_file(story.work / "out0"), story.samples[0]
    student = outputs["student_logprobs"]
    teacher = np.concatenate([s.scores.sampled_logprobs for s in samples])
    behavior = np.concatenate([s.rollout.behavior_logprobs for s in samples])
    assert np.allclose(outputs["advantages"], teacher - student, atol=1e-6)
    ratio = np.exp(student - behavior)
    weights = np.where((ratio >= 0.5) & (ratio <= 2.0), ratio, 0.0)
    assert np.allclose(outputs["weights"], weights, atol=1e-5)
    metrics = story.results["train0"]["metrics"]
    loss = -(weights * (teacher - student) * student).mean()
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["train/kl_reverse"] == pytest.approx((student - teacher).mean(), rel=1e-4)
    assert metrics["train/tokens"] == len(student)
    drift = np.exp((student - behavior).mean())
    assert metrics["offpolicy/ppl_drift"] == pytest.approx(drift, rel=1e-4)


def test_train_moves_the_weights_and_reports_every_metric(story: Story) -> None:
    result = story.results["train0"]
    assert result["applied"] and result["why_not_applied"] is None
    for name in ("loss", "kl_reverse", "entropy", "grad_norm", "lr", "advantage_mean"):
        assert f"train/{name}" in result["metrics"]
    for name in ("logprob_diff_mean", "logprob_diff_max", "masked_frac", "ppl_drift"):
        assert f"offpolicy/{name}" in result["metrics"]
    assert not _same_weights(story.published["v0"], story.published["v4"])


def test_a_nan_is_not_applied_and_named(story: Story) -> None:
    result = story.results["nan"]
    assert not result["applied"]
    assert result["why_not_applied"] == (
        "teacher log-prob is not finite: sample s2, response token 7"
    )
    assert _same_weights(story.published["v4"], story.published["v4_after_nan"])


def test_the_learning_rate_warms_up_then_falls(story: Story) -> None:
    rates = [story.results[f"train{i}"]["metrics"]["train/lr"] for i in range(4)]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    assert story.results["resumed3"]["metrics"]["train/lr"] == rates[3]


def test_resume_continues_bitwise(story: Story) -> None:
    assert story.results["resume"]["optimizer_step"] == 2
    for i in (2, 3):
        resumed, straight = story.results[f"resumed{i}"], story.results[f"train{i}"]
        assert resumed["metrics"] == straight["metrics"]
    assert _same_weights(story.published["v4"], story.published["v4_resumed"])


def test_the_weights_of_a_commit_are_loaded_alone(story: Story) -> None:
    assert _same_weights(story.published["v2"], story.published["v2_alone"])


def test_a_save_beside_training_writes_what_one_that_waits_writes(story: Story) -> None:
    assert story.results["finish_save"] == story.results["save"]
    assert story.results["save"]["files"] > 2  # a file of each rank, and what belongs to all
    folders = [story.work / name for name in ("commit", "commit_while_training")]
    # .metadata also holds an identifier of the save.
    sizes = [{p.name: p.stat().st_size for p in folder.glob("[!.]*")} for folder in folders]
    assert sizes[0] == sizes[1]


def test_a_stale_batch_ends_the_learner_with_its_reason(story: Story) -> None:
    error = story.stale["error"]
    assert (error["type"], error["exit_code"]) == ("ContractError", 75)
    assert "made by weight version 3, the learner trains version 4" in error["message"]
    assert story.stale_exit_code != 0


def test_ranks_die_with_their_launcher(story: Story) -> None:
    assert story.survivors == []
