"""The planner: its counts against published models and figures, its rules against each other, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from opd_megatron.config.overrides import change
from opd_megatron.config.recipe_facts import gpus_by_role
from opd_megatron.config.recipes import find_recipes, load_recipe
from opd_megatron.config.schema import Recipe, ServerConfig
from opd_megatron.errors import ConfigError
from opd_megatron.launch.planner.hardware import DEVICES, EFFICIENCY, device_named
from opd_megatron.launch.planner.memory import cache_tokens
from opd_megatron.launch.planner.plan import make_plan, models_of
from opd_megatron.launch.planner.split import best_split
from opd_megatron.launch.planner.stages import (
    Lengths,
    StepTime,
    decode_step_s,
    num_microbatches,
    prefill_s,
    rollout_s,
    running_sequences,
    step_time,
)
from opd_megatron.launch.planner.work import (
    forward_flops,
    kv_bytes,
    layers_flops,
    parameters,
    training_flops,
)
from opd_megatron.megatron.architecture import Architecture, architecture_of
from opd_megatron.megatron.known_models import PUBLISHED

H100, GB200 = DEVICES["h100"], DEVICES["gb200"]
LONG = Lengths(0, 8192)
SMALL = "qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16"
LARGE = "qwen3_4b_base_from_qwen3_32b_32gpu_h100_bf16"


def arch(name: str) -> Architecture:
    return architecture_of(PUBLISHED[name][0], name)


def recipe(name: str = SMALL, **values: object) -> Recipe:
    return change(load_recipe(name)[0], {k.replace("__", "."): v for k, v in values.items()})


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith(("Qwen3", "Llama"))])
def test_parameters_are_those_of_the_model_cards(name: str) -> None:
    padding = arch(name).padded_vocab_size - arch(name).vocab_size
    assert padding == 0
    assert parameters(arch(name)) == PUBLISHED[name][1]


def test_operations_of_a_token_are_two_a_weight_and_four_a_pair_of_positions() -> None:
    qwen = arch("Qwen3-32B")
    table = qwen.hidden_size * qwen.vocab_size
    assert forward_flops(qwen, 0) == pytest.approx(
        2 * (PUBLISHED["Qwen3-32B"][1] - table), rel=1e-5
    )
    assert forward_flops(qwen, 4096) - forward_flops(qwen, 0) == 4 * 4096 * 64 * 128 * 64
    plain, again = (training_flops(qwen, 4096, recompute) for recompute in (False, True))
    assert plain == 3 * forward_flops(qwen, 4096)
    assert again - plain == layers_flops(qwen, 4096)


@pytest.mark.parametrize(
    ("name", "reached", "tokens_s"),
    # Megatron-Bridge 25.11: TFLOP/s and tokens/s of a GPU at 8,192 tokens.
    [("Llama-3-8B", 744e12, 14451), ("Llama-3-8B", 1622e12, 31508), ("Llama-3-8B", 1533e12, 29789)],
)
def test_published_training_speeds_follow_from_published_flops(
    name: str, reached: float, tokens_s: float
) -> None:
    assert reached / training_flops(arch(name), 4096, False) == pytest.approx(tokens_s, rel=0.01)


def test_decoding_reads_the_cache_and_a_share_of_the_weights() -> None:
    """By hand: (4,096 x 147,456 B + 16.4 GB / 90) / 3.35 TB/s = 235 GPU-seconds a million tokens, at the peak."""
    qwen = arch("Qwen3-8B")
    assert kv_bytes(qwen, 2) == 147_456
    spent = decode_step_s(qwen, ServerConfig(), H100, 90, 4096) / 90 * 1e6 * EFFICIENCY.decode
    assert spent == pytest.approx(235, rel=0.01)
    halved = decode_step_s(qwen, ServerConfig(tensor_parallel=2), H100, 90, 4096)
    assert halved == pytest.approx(spent * 90 / 1e6 / EFFICIENCY.decode / 2, rel=0.01)


def test_a_full_cache_makes_waves_and_a_free_one_does_not() -> None:
    qwen, server = arch("Qwen3-8B"), ServerConfig()
    room = cache_tokens(qwen, server, H100)
    assert room == (0.8 * 80e9 - 2 * parameters(qwen)) // 147_456
    running = running_sequences(qwen, server, H100, 10_000, LONG)
    assert running == room // 4096
    few_s, few = rollout_s(qwen, server, H100, 8, LONG)
    assert few == 8
    assert few_s == pytest.approx(8192 * decode_step_s(qwen, server, H100, 8, 4096))
    one_wave, _ = rollout_s(qwen, server, H100, running, LONG)
    three_waves, _ = rollout_s(qwen, server, H100, 3 * running, LONG)
    assert three_waves == pytest.approx(3 * one_wave)


def test_prefill_is_compute_over_all_gpus() -> None:
    """By hand, 1M tokens of a 32B teacher at 8,192: (64.0 + 8.6) GFLOP / (0.55 x 989 TFLOP/s) = 133 GPU-seconds."""
    qwen = arch("Qwen3-32B")
    samples = 1_000_000 / 8192
    spent = prefill_s(qwen, ServerConfig(tensor_parallel=2), H100, 122, LONG) * 2 * samples / 122
    assert spent == pytest.approx(133.4, rel=0.01)


def test_micro_batches_hold_whole_samples() -> None:
    found = recipe(batch__tokens_per_microbatch=17000, learner__data_parallel=4)
    assert num_microbatches(found, 512, Lengths(300, 8192)) == 64  # two of 8,492 tokens in each
    assert num_microbatches(found, 512, Lengths(400, 8192)) == 128  # 17,184 tokens are too many
    assert (
        num_microbatches(found, 510, Lengths(300, 8192)) == 64
    )  # the fullest rank has 128 samples


@pytest.mark.parametrize(
    ("values", "stage"),
    [
        ({"rollout.server.num_servers": 16}, "rollout"),
        ({"teachers.main.server.num_servers": 8}, "teacher"),
        ({"learner.data_parallel": 8}, "learner"),
        ({"learner.recompute": False}, "learner"),
        ({"learner.precision": "fp8"}, "learner"),
        ({"weight_sync.route": "disk"}, ""),
    ],
)
def test_more_of_a_role_shortens_its_stage_and_no_other(
    values: dict[str, object], stage: str
) -> None:
    before = recipe()
    old, new = (
        step_time(r, models_of(r), GB200, Lengths(128, 8192))
        for r in (before, change(before, values))
    )
    for name in ("rollout", "teacher", "learner", "sync"):
        if name == stage:
            assert getattr(new, name) < getattr(old, name)
        else:
            assert getattr(new, name) == getattr(old, name)


def test_a_step_is_the_sum_of_its_stages_or_the_slowest_when_they_overlap() -> None:
    time = step_time(recipe(), models_of(recipe()), GB200, Lengths(128, 8192))
    parts = time.rollout + time.teacher_left + time.learner + time.sync + time.evaluation
    assert time.step == pytest.approx(parts)
    assert 0 < time.teacher_left <= time.teacher
    other = replace(time, mode="async")
    assert other.step == max(time.rollout, time.teacher, time.learner) + time.sync + time.evaluation


def test_the_cpu_of_the_table_is_for_models_as_small_as_the_demo() -> None:
    large = recipe(device="cpu")
    with pytest.raises(ConfigError, match="has 4,022,468,096 parameters"):
        make_plan(large, DEVICES["cpu"], LONG)


def one_step_off_s(rollout: float, left: float, learner: float, steps: int = 200) -> float:
    """Seconds of a step, played: rollouts and learner begin when new weights are there, the next ones wait for both."""
    now = ends = 0.0
    for _ in range(steps):
        scored = ends + left  # of the rollouts that the learner takes now
        ends = now + rollout
        now = max(ends, max(now, scored) + learner)
    return now / steps


@pytest.mark.parametrize(
    ("rollout", "left", "learner"),
    [(10, 0, 4), (4, 0, 10), (8, 4, 6), (6, 4, 8), (7, 7, 7), (10, 3, 5), (5, 3, 10)],
)
def test_one_step_off_takes_as_long_as_it_does_when_played(
    rollout: float, left: float, learner: float
) -> None:
    time = StepTime(rollout, left, left, learner, 0.0, 0.0, "one_step_off", 1)
    assert time.step == pytest.approx(one_step_off_s(rollout, left, learner), rel=0.02)


@pytest.mark.parametrize("mode", ["sync", "one_step_off", "async"])
def test_the_plan_follows_the_overlap_of_the_recipe(mode: str) -> None:
    found = recipe(overlap__mode=mode, max_staleness=0 if mode == "sync" else 1)
    time = step_time(found, models_of(found), GB200, Lengths(128, 8192))
    assert (time.mode, time.overlapped) == (mode, mode != "sync")


def test_a_switch_is_planned_for_its_slowest_teacher_and_rows_share_the_work() -> None:
    found = recipe("qwen3_4b_base_from_qwen3_32b_32gpu_gb200_bf16_hard_switch")
    models, lengths = models_of(found), Lengths(128, 8192)
    alone = prefill_s(models.teachers["32b"], found.teachers["32b"].server, GB200, 512, lengths)
    assert step_time(found, models, GB200, lengths).teacher == pytest.approx(alone)
    rows = change(found, {"teaching.kind": "rows", "teaching.starts": {}})
    assert step_time(rows, models, GB200, lengths).teacher == pytest.approx(alone / 4)


def test_the_split_is_the_best_of_all_that_fit() -> None:
    found = recipe(rollout__server__num_servers=2, learner__data_parallel=10)
    models, lengths = models_of(found), Lengths(128, 8192)
    total = sum(gpus_by_role(found).values())
    best = best_split(found, models, GB200, lengths, whole_nodes=False)
    assert sum(best.gpus.values()) == total
    every = {}
    for learner, teacher in itertools.product(range(1, total), range(1, total)):
        if learner + teacher < total:
            values = {
                "learner.data_parallel": learner,
                "rollout.server.num_servers": total - learner - teacher,
                "teachers.main.server.num_servers": teacher,
            }
            every[(learner, teacher)] = step_time(
                change(found, values), models, GB200, lengths
            ).step
    assert best.time.step == pytest.approx(min(every.values()))
    assert best.time.step < step_time(found, models, GB200, lengths).step
    whole = best_split(found, models, GB200, lengths, whole_nodes=True)
    assert all(gpus % GB200.gpus_per_node == 0 for gpus in whole.gpus.values())
    assert whole.time.step >= best.time.step


@pytest.mark.parametrize("name", [n for n in find_recipes() if not n.startswith("demo")])
def test_every_recipe_for_gpus_fits_where_its_name_says(name: str) -> None:
    found = recipe(name)
    hardware = next(h for h in DEVICES if f"_{h}_" in name)
    plan = make_plan(found, DEVICES[hardware], Lengths(128, found.rollout.max_new_tokens))
    assert all(role.total < DEVICES[hardware].memory for role in plan.memory)
    assert plan.time.step > 0 and plan.gpu_hours(1) == plan.time.step * plan.num_gpus / 3600
    # Nothing above a tenth is left on the table.
    assert plan.balanced.time.step > 0.9 * plan.time.step


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teachers.main.server.tensor_parallel": 1}, "teacher-main does not fit: weights: weights of 61.0"),
        ({"teachers.main.server.mem_fraction_static": 0.42}, "does not fit: KV cache"),
        ({"learner.recompute": False, "batch.tokens_per_microbatch": 32768}, "the largest term is activations"),
        ({"batch.tokens_per_microbatch": 131072, "learner.data_parallel": 8}, "the largest term is logits"),
        ({"learner.distributed_optimizer": False}, "the largest term is optimizer"),
        ({"rollout.server.mem_fraction_static": 0.98}, "rollout"),
        ({"student.path": "Qwen/Qwen3-5B"}, "did you mean"),
    ],
)  # fmt: skip
def test_what_can_not_fit_is_refused_with_its_term(values: dict[str, object], words: str) -> None:
    found = change(load_recipe(LARGE)[0], values)
    with pytest.raises(ConfigError, match=words):
        make_plan(found, H100, Lengths(128, 8192))


def test_devices_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        device_named("h10")
