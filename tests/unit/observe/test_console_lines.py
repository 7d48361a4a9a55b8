"""What a run prints."""

from __future__ import annotations

import io

import pytest

from opd_megatron.observe.console import RunConsole, evaluation_line, result_line, step_line
from opd_megatron.observe.formats import encodable, human_count, human_duration, human_value

ROW = {
    "step": 12,
    "train/loss": 0.1834,
    "train/kl_reverse": 0.0712,
    "offpolicy/masked_frac": 0.02,
    "rollout/len_mean": 17.52,
    "train/tokens": 2240,
    "perf/step_s": 1.0667,
}
SUMMARY = {
    "recipe": "demo",
    "accuracy_before": 0.3464,
    "accuracy_after": 0.9049,
    "teacher_accuracy": 0.966,
    "kl_before": 0.6271,
    "kl_after": 0.0758,
    "steps": 80,
    "wall_s": 181.4,
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4s"), (9.96, "10s"), (59.6, "1m00s"), (112, "1m52s"), (8040, "2h14m"),
     (86399.9, "1d00h"), (273600, "3d04h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(17.52, "17.5"), (99.96, "100"), (812, "812"), (999.7, "1.0k"), (2100, "2.1k"),
     (41249, "41.2k"), (999960, "1.0M"), (3.2e6, "3.2M"), (2e9, "2.0G")],
)  # fmt: skip
def test_counts(value: float, text: str) -> None:
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.3614, "fraction", "36.1%"), (0.1831, "nats", "0.183"), (3.44e-6, "nats", "3.4e-06"),
     (17.52, "tokens", "17.5"), (123.4, "tokens", "123"), (1.00002, "ratio", "1.00002"),
     (0, "nats", "0"), (0.0015, "1", "0.0015"), (2240, "tokens", "2.2k"),
     (-0.065, "nats", "-0.065")],
)  # fmt: skip
def test_values(value: float, unit: str, text: str) -> None:
    assert human_value(value, unit) == text


def test_step_line_shows_the_step_in_one_line() -> None:
    assert step_line(ROW, 80, 112.0) == (
        "step 12/80 loss 0.183 kl 0.071 keep 0.98 len 17.5 tok/s 2.1k eta 1m52s"
    )


def test_step_line_shows_updates_that_were_not_applied() -> None:
    line = step_line({**ROW, "train/skipped": 2}, 400, None)
    assert line == "step  12/400 loss 0.183 kl 0.071 keep 0.98 len 17.5 tok/s 2.1k SKIPPED 2 eta -"
    assert "SKIPPED" not in step_line({**ROW, "train/skipped": 0}, 400, None)


def test_step_line_says_dash_for_what_was_not_measured() -> None:
    assert step_line({"step": 1}, 80, None) == ("step  1/80 loss - kl - keep - len - tok/s - eta -")


def test_step_zero_shows_its_evaluation_only_and_an_evaluated_step_both() -> None:
    stream = io.StringIO()
    console = RunConsole(80, stream)
    measured = {"eval/heldout/accuracy": 0.3464, "eval/heldout/kl_reverse": 0.6271}
    console.step({"step": 0, **measured, "eval/heldout/teacher_accuracy": 0.966})
    console.step({**ROW, "eval/heldout/accuracy": 0.732})
    before, step, after = stream.getvalue().splitlines()
    assert before == "held-out before training: accuracy 34.6% kl 0.627 (teacher 96.6%)"
    assert step.startswith("step 12/80 ") and after == "held-out after step 12: accuracy 73.2%"
    assert evaluation_line(ROW) is None


def test_eta_is_judged_by_recent_steps_and_counts_evaluation() -> None:
    stream = io.StringIO()
    console = RunConsole(total_steps=4, stream=stream)
    console.step({"step": 1, "perf/step_s": 10.0})
    console.step({"step": 2, "perf/step_s": 10.0, "perf/eval_s": 20.0})
    console.step({"step": 4, "perf/step_s": 10.0})
    etas = [line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert etas == ["30s", "40s", "0.0s"]


def test_console_is_plain_and_never_wraps_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    line = "[b]not markup[/b] :smile: " + "x" * 300
    RunConsole(1, stream).say(line)
    RunConsole(1, stream).role("rollout-0", "ready after 41s")
    assert stream.getvalue() == line + "\n[rollout-0] ready after 41s\n"


def test_result_line() -> None:
    assert result_line(SUMMARY) == (
        "demo: accuracy 34.6% \u2192 90.5% (teacher 96.6%) \u00b7 KL 0.627 \u2192 0.076 nats/token "
        "\u00b7 80 steps \u00b7 181 s"
    )


def test_the_result_line_leaves_out_what_was_not_measured() -> None:
    summary = {**SUMMARY, "recipe": "demo_sft", "teacher_accuracy": None, "kl_before": None}
    assert (
        result_line(summary) == "demo_sft: accuracy 34.6% \u2192 90.5% \u00b7 80 steps \u00b7 181 s"
    )


def test_a_stream_that_holds_only_ascii_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    RunConsole(1, stream).say(result_line(SUMMARY))
    assert raw.getvalue().decode("ascii").startswith("demo: accuracy 34.6% -> 90.5% (teacher")
    assert encodable("\u4e2d", "ascii") == "\\u4e2d"
