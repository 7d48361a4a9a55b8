"""The harness of benchmarks/transport.py: what is asked, what is computed from it. Its server is a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import transport, transport_report, transport_step
from benchmarks.transport import Request
from opd_megatron.observe.writer import MetricsWriter


def record(run: dict[str, Any] | None = None) -> dict[str, Any]:
    facts = {
        "cpu": "A", "cores": 2, "memory_gib": 1, "python": "3", "torch": "2",
        "load_average_at_start": 0, "commit": "c", "date": "d",
    }  # fmt: skip

    def result(form: str, k: int, size: int, wall: float, decode: float) -> dict[str, Any]:
        return {
            "form": form, "topk": k, "tokens": 1000,
            "num_bytes": size, "wall_s": wall, "decode_s": decode, "select_s": 0.01 * (k > 0),
        }  # fmt: skip

    results = [
        result("sampled", 0, 30_000, 0.10, 0.01),
        result("base64", 64, 734_000, 0.12, 0.02),
        result("nested", 64, 1_950_000, 0.50, 0.20),
    ]
    return {
        "command": "x", "environment": facts, "vocab_size": 4096, "repeats": 3, "run": run,
        "results": results,
    }  # fmt: skip


def test_every_form_and_k_is_asked_at_every_length_and_lists_at_the_shortest() -> None:
    made = transport.requests([100, 400], [1, 64])
    assert len(made) == len(set(made)) == 2 * (1 + 4) + 2
    assert {(r.form, r.topk) for r in made if r.tokens == 400} == {
        ("sampled", 0), ("base64", 1), ("nested", 1), ("base64", 64), ("nested", 64),
    }  # fmt: skip
    assert Request("listed", 64, 100) in made and Request("listed", 64, 400) not in made


def test_what_a_list_adds_is_over_the_prefill_of_the_same_length() -> None:
    base64, nested = record()["results"][1:]
    assert transport_report.added_s(record(), base64) == pytest.approx(0.03)
    assert transport_report.added_s(record(), nested) == pytest.approx(0.59)
    assert transport_report.entry_bytes(record(), base64) == pytest.approx(11.0)


@pytest.mark.parametrize(
    ("step_us", "verdict"), [(1000.0, "3.0% at 1,000 tokens: met"), (300.0, "missed")]
)
def test_the_goal_is_judged_against_the_step_of_a_run(step_us: float, verdict: str) -> None:
    run = {"steps": 5, "step_s": 2.0, "step_s_per_token": step_us * 1e-6, "teacher_frac": 0.1}
    text = transport_report.render(record(run))
    assert verdict in text
    assert "| 1,000 | base64 | 64 | 734 | 120.0 | 20.0 | 11.0 | 30.0 | 10.0 |" in text
    assert f"not transport: {100 * 20 / step_us:.1f}% at 1,000 tokens" in text


def test_the_choice_of_the_tokens_is_timed_alone() -> None:
    assert 0.0 < transport.selection_s(8, 64, 1) < 1.0


def test_without_a_run_nothing_is_claimed() -> None:
    assert "not measured (no `--run`)" in transport_report.render(record())


def test_the_step_of_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 1, -1)
    writer.write(0, {"eval/heldout/accuracy": 0.5})
    for step, seconds in enumerate((1.0, 3.0, 2.0), start=1):
        row = {"perf/step_s": seconds, "train/tokens": 1000, "perf/teacher_s": 0.1 * seconds}
        writer.write(step, row)
    writer.close()
    found = transport.step_of(tmp_path)
    assert found["steps"] == 3 and found["step_s"] == 2.0
    assert found["step_s_per_token"] == pytest.approx(2e-3)
    assert found["teacher_frac"] == pytest.approx(0.1)


def test_what_k_adds_is_the_difference_of_two_steps_and_of_their_parts() -> None:
    def run(size: str, mode: str, topk: int, step: float, learner: float) -> dict[str, Any]:
        seconds = {
            "step": [step, 9.0, step],
            "learner": [learner] * 3,
            "rollout": [1.0],
            "teacher": [0.2],
        }
        return {
            "size": size, "mode": mode, "topk": topk, "seed": 0, "tokens": 5120.0, "load_average_at_start": 0.1,
            "seconds": seconds,
        }  # fmt: skip

    runs = [
        run(size, mode, k, step + k / 640, 0.5 + k / 3200)
        for size, step in (("demo", 2.0), ("larger", 10.0))
        for mode in transport_step.MODES
        for k in (0, 64)
    ]
    runs = [one | {"topk": max(1, one["topk"])} for one in runs]
    weights = {"demo": 300_000, "larger": 12_000_000}
    found = {**record(), "runs": runs, "repeats": 1, "weights": weights}
    assert transport_step.added(found, "demo", "sync", "step") == pytest.approx(0.1)
    assert transport_step.added(found, "demo", "sync", "learner") == pytest.approx(0.02)
    text = transport_step.to_markdown(found)
    assert (
        "12.0 M weights, `sync`: top-64 in place of top-1 adds +0.100 s, +1.0% of the step (goal 5%: met)"
        in text
    )
    assert "+0.100 s, +5.0% of the step (goal 5%: m" in text and "part grows by +0.020 s" in text
