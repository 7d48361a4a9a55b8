"""`opd estimate` as a user meets it."""

from __future__ import annotations

import json

import pytest

from opd_megatron.cli.app import main
from opd_megatron.errors import EXIT_CONFIG

NAME = "qwen3_4b_base_from_qwen3_32b_32gpu_h100_bf16"


def test_it_prints_memory_stages_cost_and_what_is_not_modelled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["estimate", NAME, "--prompts", "103022", "steps=100"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for words in ("32 x h100: learner 8, rollout 16, teacher-main 8", "activations", "KV cache",
                  "CUDA graphs", "tokens/s", "GPU-hours", "for 100 steps", "an epoch of 805 steps",
                  "balanced:", "not modelled:", "a model, not a measurement"):  # fmt: skip
        assert words in text


def test_json_holds_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", NAME, "--json", "--response-tokens", "4000"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpus"] == {"learner": 8, "rollout": 16, "teacher-main": 8}
    assert plan["lengths"] == {"prompt": 128, "response": 4000}
    assert plan["time"]["rollout"] > plan["time"]["sync"] > 0


def test_a_cluster_says_how_many_nodes_that_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", NAME, "--cluster", "h100"])
    assert "cluster h100: 4 nodes (learner 1, rollout 2, teacher-main 1)" in capsys.readouterr().out


def test_the_demo_is_planned_on_the_cluster_of_the_tests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And in seconds that a run of it took: 1.7 s a step on the machine of docs/planner.md, 107 s in all."""
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "demo", "--cluster", "cpu-test"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "cluster cpu-test: 3 nodes (learner 1, rollout 1, teacher-main 1)" in text
    assert "4 processes on a cpu" in text and "CUDA" not in text and "GPU" not in text
    assert "two cores for all processes" in text
    with pytest.raises(SystemExit):
        main(["estimate", "demo", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert (
        0.8 < plan["time"]["rollout"] + plan["time"]["teacher_left"] + plan["time"]["learner"] < 2
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([NAME, "teachers.main.server.tensor_parallel=1"], "teacher-main does not fit: weights"),
        ([NAME, "--hardware", "b300"], "--hardware='b300'"),
        ([NAME, "--cluster", "h10"], "did you mean 'h100'"),
        ([NAME, "--hardware", "cpu"], "the recipe is for device=cuda"),
        (["demo", "--hardware", "cpy"], "did you mean 'cpu'"),
        ([NAME, "--response-tokens", "9200"], "exceeds batch.tokens_per_microbatch=9216"),
    ],
)
def test_what_it_can_not_say_it_refuses(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["estimate", *arguments])
    assert stop.value.code == EXIT_CONFIG
    assert words in capsys.readouterr().err
