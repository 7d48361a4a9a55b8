"""The harness of benchmarks/loss.py on tiny sizes, with our methods and the baselines, without peers."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import catalog, loss, report, worker
from benchmarks.case import Case
from benchmarks.catalog import DENSE, ENTROPY, KL, SAMPLED
from benchmarks.goals import Goal, Run, goals
from benchmarks.inputs import Inputs, describe, make_inputs
from benchmarks.measure import extra_peak_bytes
from benchmarks.methods.baseline import naive, naive_dense
from benchmarks.objective import reference_logits_grad, relative_error

METHODS_FOLDER = Path(catalog.__file__).parent / "methods"
TINY = Case("cpu", num_tokens=12, vocab_size=600, hidden_size=64, topk=(4, 8, 16), max_repeats=3)


def float64_inputs() -> Inputs:
    inputs = make_inputs(TINY, with_logits=True, with_teacher_logits=True)
    assert inputs.logits_TV is not None and inputs.teacher_logits_TV is not None
    return replace(
        inputs,
        logits_TV=inputs.logits_TV.double(),
        teacher_logits_TV=inputs.teacher_logits_TV.double(),
    )


def made_up_run(**peaks: float) -> Run:
    calls = {"all_forward": [0.4, 0.6], "all_backward": [0.6, 0.6]}
    row = {"seconds": {"median": 1.1, "min": 1.0, **calls}, "gradient_relative_error": 0.0}
    results = {
        name: {
            "by_topk": {
                str(k): {**row, "extra_peak_L": peak, "extra_peak_bytes": 0} for k in TINY.topk
            }
        }
        for name, peak in peaks.items()
    }
    return Run(TINY, results, None)


def goal_named(run: Run, text: str) -> Goal:
    (goal,) = (goal for goal in goals(run) if goal.text == text)
    return goal


def test_a_case_survives_json() -> None:
    assert Case.from_json(TINY.to_json()) == TINY
    assert TINY.main_topk == 8


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others() -> None:
    first, again = (
        describe(make_inputs(TINY, with_logits=True, with_teacher_logits=b)) for b in (False, True)
    )
    other = describe(make_inputs(replace(TINY, seed=1), with_logits=True, with_teacher_logits=True))
    assert first == again
    assert first["digest_hidden"] != other["digest_hidden"]


def test_entropies_are_those_of_a_language_model() -> None:
    facts = describe(
        make_inputs(
            replace(TINY, num_tokens=64, vocab_size=20_000, hidden_size=512),
            with_logits=False,
            with_teacher_logits=False,
        )
    )
    assert 1.0 < facts["student_entropy_nats"] < 3.0
    assert 1.0 < facts["teacher_entropy_nats"] < 3.0


@pytest.mark.parametrize(
    ("build", "terms"), [(naive, (KL, SAMPLED, ENTROPY)), (naive_dense, (DENSE,))]
)
def test_the_reference_gradient_is_autograds(build, terms) -> None:
    inputs = float64_inputs()
    assert inputs.logits_TV is not None and inputs.teacher_logits_TV is not None
    logits_TV = inputs.logits_TV.requires_grad_()
    tensors = (logits_TV,) if build is naive else (logits_TV, inputs.teacher_logits_TV)
    (gradient_TV,) = torch.autograd.grad(build(inputs, 8)(*tensors), (logits_TV,))
    wanted_TV = reference_logits_grad(
        logits_TV.detach(), inputs.teacher_logits_TV, inputs, 8, terms
    )
    # The methods compute in float32, the reference in float64.
    assert relative_error(gradient_TV, wanted_TV) < 1e-5


@pytest.mark.parametrize(
    "identifier",
    [
        "logits/ours torch",
        "logits/ours torch in place",
        "logits/naive",
        "logits/naive, checkpointed",
        "head/naive",
        "dense/naive",
        "dense_head/naive",
    ],
)
def test_a_worker_measures_time_memory_and_a_right_gradient(identifier: str) -> None:
    result = worker.run(catalog.find(identifier), TINY)
    row = result["by_topk"][str(TINY.main_topk)]
    assert row["gradient_relative_error"] < (0.005 if identifier.startswith("logits") else 0.1)
    assert row["extra_peak_bytes"] >= 0
    assert len(row["seconds"]["all_backward"]) == 3
    assert 0 < row["seconds"]["min"] <= row["seconds"]["median"]


def test_a_wrong_gradient_shows_in_the_error() -> None:
    lying = replace(catalog.find("logits/naive"), terms=(KL, SAMPLED))
    row = worker.run(lying, TINY)["by_topk"]["8"]
    honest = worker.run(catalog.find("logits/naive"), TINY)["by_topk"]["8"]
    assert row["gradient_relative_error"] > 3 * honest["gradient_relative_error"]


def test_the_peak_counts_what_was_freed_before_the_end_and_nothing_else() -> None:
    size = 64 << 20
    kept = torch.ones(size, dtype=torch.uint8)

    def call() -> torch.Tensor:
        torch.ones(size, dtype=torch.uint8)
        return kept[:1] + 1

    assert 0.9 * size < extra_peak_bytes(call, "cpu") < 1.2 * size
    assert extra_peak_bytes(lambda: None, "cpu") < 0.1 * size


def test_every_method_names_a_function_that_exists() -> None:
    for method in catalog.METHODS:
        module, name = method.function.split(":")
        tree = ast.parse((METHODS_FOLDER / f"{module}.py").read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        assert name in defined, method
    assert len({catalog.method_id(m) for m in catalog.METHODS}) == len(catalog.METHODS)


def test_goals_are_met_missed_or_not_measured() -> None:
    run = made_up_run(
        **{"logits/ours compiled": 1.1, "logits/ours compiled in place": 0.3, "logits/naive": 10.0}
    )
    assert goal_named(run, "extra peak, stored").verdict == "met"
    assert goal_named(run, "extra peak, in place").verdict == "missed"
    against_peers = "extra peak, stored, over that of the best peer with the same terms"
    assert goal_named(run, against_peers).verdict == "not measured"
    against_all = goal_named(
        run, "extra peak, stored, over that of the best of peers and baselines"
    )
    assert against_all.value == pytest.approx(0.11)
    assert goal_named(run, "speed, stored, over naive").verdict == "missed"


def test_a_failed_method_is_named_in_the_table() -> None:
    run = made_up_run(**{"logits/naive": 10.0})
    run.results["logits/ours torch"] = {"error": "out of memory"}
    facts = dict.fromkeys(
        [
            "cpu",
            "cores",
            "memory_gib",
            "kernel",
            "python",
            "torch",
            "megatron-core",
            "transformers",
            "commit",
            "date",
            "load_average_at_start",
        ],
        "?",
    )
    run.results["logits/naive"]["inputs"] = dict.fromkeys(
        ["student_entropy_nats", "teacher_entropy_nats", "student_mass_on_support"], 1.0
    )
    text = report.render({"environment": facts, "threads": 1, "command": "x"}, run)
    assert "| failed: out of memory |" in text
    assert "| ours compiled | log-probs of target and K ids, entropy, log Z | not run |" in text


def test_tables_replace_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- loss cpu begin -->\nold\n<!-- loss cpu end -->\nb\n")
    for _ in range(2):
        report.write_between_markers(page, "loss cpu", "new\n")
    assert page.read_text() == "a\n<!-- loss cpu begin -->\n\nnew\n\n<!-- loss cpu end -->\nb\n"
    with pytest.raises(ValueError, match="loss cuda begin"):
        report.write_between_markers(page, "loss cuda", "new")


def test_the_page_has_markers_for_both_devices(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(loss.DOCS_PAGE.read_text())
    for name in ("loss cpu", "loss cuda", "step cpu", "step cuda"):
        report.write_between_markers(copy, name, f"new {name}")
        assert f"<!-- {name} begin -->\n\nnew {name}\n" in copy.read_text()


def test_the_command_runs_each_method_in_its_process_and_writes_json(
    tmp_path: Path, capsys
) -> None:
    out = tmp_path / "record.json"
    sizes = ["--tokens", "12", "--vocab", "600", "--hidden", "64", "--topk", "4,8,16"]
    options = ["--threads", "1", "--quick", "--no-peers", "--only", "^logits/naive$"]
    before = loss.DOCS_PAGE.read_text()
    assert loss.main(["--device", "cpu", *sizes, *options, "--write-docs", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["results"]["logits/naive"]["by_topk"]["8"]["extra_peak_bytes"] > 0
    assert record["floor"]["copy_bytes_per_s"] > 0
    assert record["environment"]["commit"]
    printed = capsys.readouterr()
    assert "| naive | log-probs of target and K ids, entropy |" in printed.out
    # A partial run does not replace the published tables.
    assert "not published" in printed.err
    assert loss.DOCS_PAGE.read_text() == before


def test_a_support_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(SystemExit, match="--topk"):
        loss.main(["--device", "cpu", "--vocab", "100", "--topk", "16,128"])


def test_methods_that_saw_other_tensors_stop_the_run() -> None:
    same = {"a": {"inputs": {"digest": 1}}, "b": {"inputs": {"digest": 1}}, "c": {"error": "x"}}
    loss._check_same_inputs(same)
    with pytest.raises(SystemExit, match="different tensors"):
        loss._check_same_inputs({**same, "d": {"inputs": {"digest": 2}}})
